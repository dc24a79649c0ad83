"What a notebook types: `from ecan_fastai.all import *`, after fastai's own imports or without them."

from fastai.vision.all import *  # first: it binds names (A, for one) that must not hide ours

from ecan_fastai.augment import CROPS, LEVELS, RECIPES, eval_pipelines, train_pipeline
from ecan_fastai.callbacks import (
    CPUMixedPrecision,
    CropsAsImages,
    LossPartsRecorder,
    MemoryBankUpdate,
    MomentumUpdate,
    ProgressiveResize,
)
from ecan_fastai.check import check_data, show_pairs
from ecan_fastai.config import KINDS, METHODS, RunConfig
from ecan_fastai.data import FaceImage, FaceTransform, TwoView, TwoViewBlock, TwoViewDL, read_face
from ecan_fastai.detector import FaceFinder
from ecan_fastai.experiments import EXPERIMENTS, experiment_results, experiment_table, reproduce
from ecan_fastai.inference import Predictor
from ecan_fastai.interpret import (
    grad_cam,
    plot_class_counts,
    plot_confusion,
    plot_confusions,
    plot_grad_cam,
    plot_history,
    plot_sweep,
    plot_tsne,
    probe,
)
from ecan_fastai.learner import (
    ECANLearner,
    baseline_learner,
    cosine_with_warmup,
    ecan_learner,
    face_metrics,
    face_splitter,
    paper_opt,
)
from ecan_fastai.loaders import ExpressionDataLoaders
from ecan_fastai.losses import (
    AffinityLoss,
    CenterLoss,
    ECANLoss,
    ENSCLoss,
    ESCLoss,
    MVALoss,
    PaperReading,
    SupConLoss,
    affinity_loss,
    center_loss,
    ensc_loss,
    esc_loss,
    mean_cosines,
    mva_loss,
    mva_weight,
    selfcon_loss,
    supcon_loss,
)
from ecan_fastai.metrics import per_class_table, split_metrics
from ecan_fastai.model import ECANModel, FaceClassifier, MemoryBank, load_encoder
from ecan_fastai.readers.factory import detect_kind, read_faces
from ecan_fastai.readers.records import EXPRESSIONS, EXPRESSIONS_8, Face, expression_name
from ecan_fastai.runs import resume_run, start_run
from ecan_fastai.sample import draw_face, sample_faces
