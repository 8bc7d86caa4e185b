"""What a model generates, as lines of text: the words beside the pictures of `cmvae.visualize.figures`."""

from __future__ import annotations

from collections.abc import Mapping

from numpy.typing import NDArray

from cmvae.clustering import BoolArray
from cmvae.modalities import Modality

_HEAD = (
    "What samples say, and what is generated from each of their modalities; from itself, it is reconstructed."
)


def cross_modal_listing(
    inputs: Mapping[str, NDArray],
    generated: Mapping[tuple[str, str], NDArray],
    *,
    modalities: Mapping[str, Modality],
    present: Mapping[str, BoolArray],
) -> str | None:
    """Sample by sample every modality that is read in words, real and generated from each modality.

    Args:
        inputs: modality → (N, *shape), as stored.
        generated: (source, target) → (N, *shape), for every ordered pair.
        modalities: by name.
        present: modality → (N,) bool. What would be generated from what a sample lacks is left out.

    Returns:
        Plain text; None where no modality is read in words.
    """
    targets = [name for name in inputs if modalities[name].in_words]
    if not targets:
        return None
    width = max(map(len, inputs)) + len("from ")
    lines = [_HEAD]
    for sample in range(len(inputs[targets[0]])):
        lines += ["", f"sample {sample + 1}"]
        for target in targets:
            modality = modalities[target]
            is_there = present[target][sample]
            said = {"real": modality.describe(inputs[target][sample]) if is_there else "(missing)"}
            said |= {
                f"from {source}": modality.describe(generated[source, target][sample])
                for source in inputs
                if present[source][sample]
            }
            lines.append(f"  {target}")
            lines += [f"    {title:<{width}}  {words}".rstrip() for title, words in said.items()]
    return "\n".join(lines) + "\n"
