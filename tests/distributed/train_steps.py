"""Run by test_ranks.py under a launcher: a few updates on one fixed sequence of global batches.

    train_steps.py CONFIG OUTPUT STEPS MISSING [key=value …]

Every rank reads the same global batches and takes its own part of each, so that the result must not depend on
how many ranks there are. The second half of every global batch lacks the modality
MISSING, if there is one of that name: of two ranks, all that the second one reads. Rank 0 writes the losses
and the export to OUTPUT.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import set_seed

from cmvae.config import load_config
from cmvae.data.batch import to_device
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader, TrainingLoader
from cmvae.distributed import let_deepspeed_autocast, start_accelerator
from cmvae.models.cmvae import CMVAE
from cmvae.models.precision import autocast_dtype
from cmvae.training.cmvae_task import CMVAETask
from cmvae.training.optimization import build_optimizer, reinitialize_parameters
from cmvae.training.step_checks import StopRequest, all_reduce_step_check
from cmvae.utils.process_exit import exit_process


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[5:])
    output, steps, missing = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    accelerator = start_accelerator(config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    per_rank = config.train.batch_size
    mine = slice(rank * per_rank, (rank + 1) * per_rank)

    set_seed(config.seed)
    index = ShardIndex.load(config.data.shards)
    model = CMVAE(
        config.model, index.modalities, autocast_dtype(config.train.mixed_precision, accelerator.device)
    )
    task = CMVAETask(model, config.objective)
    let_deepspeed_autocast(accelerator, task.autocast_dtype)
    module, optimizer = accelerator.prepare(task, build_optimizer(task, config.optimizer))

    loader = TrainingLoader(
        config.data.shards,
        modalities=model.modality_names,
        batch_size=per_rank * world_size,
        seed=config.seed,
    )

    def read_split(split: str, num_samples: int | None) -> EvaluationLoader:
        return EvaluationLoader(
            config.data.shards,
            split=split,
            modalities=model.modality_names,
            batch_size=64,
            num_samples=num_samples,
        )

    task.begin(steps)
    losses = []
    with StopRequest.listening() as stop:
        for raw, step in zip(loader.epoch_batches(0), range(steps), strict=False):
            values = task.reinitialize(step, lambda num_samples: read_split("train", num_samples))
            reinitialize_parameters(accelerator, optimizer, values)
            if missing in model.modality_names:
                raw["mask"][len(raw["mask"]) // 2 :, model.modality_names.index(missing)] = False
            part = {name: value[mine] for name, value in raw.items()}
            part |= {"_seed": step, "_place": range(mine.start, mine.stop)}
            batch = to_device(part, task.modalities, accelerator.device)
            with accelerator.accumulate(module):
                loss, report = module(batch)
                all_reduce_step_check(accelerator, loss, report, stop).read()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())

    # One more forward in evaluation mode, whose outputs the export must reproduce.
    module.eval()
    with torch.no_grad():
        _, report = module(batch)
    live = report["shared_loc"][:1].cpu()
    weights = accelerator.get_state_dict(module)
    if accelerator.is_main_process:
        task.export(output / "export", weights, read_split)
        exported = CMVAE.from_pretrained(output / "export")
        inputs = {name: batch[name][:1].cpu() for name in model.modality_names}
        again = torch.stack([posterior.shared.loc for posterior in exported.encode(inputs).values()], dim=1)
        result = {
            "losses": losses,
            "world_size": world_size,
            "distributed_type": accelerator.distributed_type.value,
            "export_difference": (again - live).abs().max().item(),
        }
        (output / "result.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
    exit_process(0)
