"""The data sets that can be packed: name of the sub-command to its module.

Importing this imports no library that is slow to import: the modules import theirs when a source is opened.
"""

from cmvae.datasets import cubicc, digits, digits_mixed, folder, polymnist, table
from cmvae.datasets.base import SourceModule

SOURCES: dict[str, SourceModule] = {
    "digits": digits,
    "digits_mixed": digits_mixed,
    "polymnist": polymnist,
    "cubicc": cubicc,
    "table": table,
    "folder": folder,
}
