"Facial expression recognition with fastai: the Extra-Contrast Affinity Network (ECAN)"

import os

# albumentations asks the network for its newest version when it is imported, unless this is set
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"
