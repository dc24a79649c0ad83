"A run of seconds, which several test files train"

from ecan_fastai.config import UNUSED, RunConfig

SMALL = dict(
    arch="resnet10t",
    size=32,
    channels=1,
    recipe="fer2013",
    level="weak",
    epochs=1,
    bs=16,
    opt="adam",
    momentum=0.9,
    workers=0,
)


def small_config(data, method="ecan", **settings):
    "A small run on `data` with these settings, without those that have no effect under `method`"
    settings = {k: v for k, v in {**SMALL, **settings}.items() if k not in UNUSED[method]}
    return RunConfig(str(data), method=method, **settings)
