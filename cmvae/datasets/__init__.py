"""Data sets that can be packed: the module of each sub-command of `cmvae pack`.

The modules import slow libraries only when a source is opened.
"""

from cmvae.datasets import cubicc, digits, digits_mixed, folder, polymnist, table, webdataset
from cmvae.datasets.base import SourceModule

SOURCES: dict[str, SourceModule] = {
    "digits": digits,
    "digits_mixed": digits_mixed,
    "polymnist": polymnist,
    "cubicc": cubicc,
    "table": table,
    "folder": folder,
    "webdataset": webdataset,
}
