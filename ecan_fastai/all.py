"Everything a notebook needs: `from ecan_fastai.all import *`, after fastai's own imports or without them."
from fastai.vision.all import *  # first: it binds names (A, for one) that must not hide ours

from ecan_fastai.augment import *
from ecan_fastai.callbacks import *
from ecan_fastai.check import *
from ecan_fastai.data import *
from ecan_fastai.datasets import *
from ecan_fastai.experiments import *
from ecan_fastai.faces import *
from ecan_fastai.inference import *
from ecan_fastai.interpret import *
from ecan_fastai.layers import *
from ecan_fastai.learner import *
from ecan_fastai.losses import *
from ecan_fastai.model import *
from ecan_fastai.published import *
