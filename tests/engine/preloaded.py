"""What the runs of the tests import, once for all processes: by themselves they would spend most of their time on it."""

import importlib
import pkgutil

import decord  # noqa: F401
import mlflow.tracking  # noqa: F401
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
import torchvision.io  # noqa: F401

import core.models
import core.provenance
import core.systems
import core.train
import data
import registry  # noqa: F401

for package in (core.models, core.systems, data):
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)

core.provenance.environment()
