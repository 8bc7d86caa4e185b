"""Make `import torchvision` work with a CPU build of torch. Import this module before torchvision.

The compiled part of PyPI's torchvision needs CUDA libraries. If it cannot be loaded, the import fails at
`torchvision::nms`, an operator that this project does not use: torchvision registers fake versions of two of
its operators at import. Declaring these two makes its Python parts (datasets, transforms, models) work.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _compiled_part_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return True
    return False


if not _compiled_part_loads():
    # Operators are removed with the object that declared them, so it must live as long as the process.
    _declarations = torch.library.Library("torchvision", "FRAGMENT")
    for _schema in _SCHEMAS:
        _declarations.define(_schema)
