"""What to change when a training does not fit."""

from __future__ import annotations

from cmvae.config import CMVAEExperiment, ExperimentConfig


def out_of_memory_advice(config: ExperimentConfig, zero_stage: int) -> str:
    """What to set so that a training takes less memory, the cheapest first.

    Args:
        config: the experiment that did not fit.
        zero_stage: how it was distributed; 0 for plain data parallelism.
    """
    train, remedies = config.train, []
    if train.batch_size > 1:
        half, twice = train.batch_size // 2, train.gradient_accumulation_steps * 2
        remedies.append(
            f"train.batch_size={half} with train.gradient_accumulation_steps={twice}, which is the same "
            "global batch"
        )
    if train.mixed_precision == "fp32":
        remedies.append("train.mixed_precision=bf16")
    if isinstance(config, CMVAEExperiment):
        if config.objective.num_samples > 1:
            remedies.append(f"objective.num_samples below {config.objective.num_samples}")
        if config.objective.cross_sources == "all" and len(config.model.modalities) > 2:
            remedies.append("objective.cross_sources=1, which decodes fewer modalities at a time")
        if config.objective.max_decoded is None:
            remedies.append(
                f"objective.max_decoded={2 * train.batch_size}, which decodes in parts, and longer"
            )
    if zero_stage < 3:
        remedies.append(
            f"on several GPUs, --config_file configs/accelerate/zero{max(2, zero_stage + 1)}.yaml"
        )
    return "out of memory. Any of these takes less: " + "; ".join(remedies)
