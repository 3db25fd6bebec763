"""transformers' Trainer with a teacher, steps relative to each parameter, and checkpoints of what learns."""

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, is_tensorboard_available
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kvfold.convert.source.stream import last_states
from kvfold.errors import ConversionError
from kvfold.recipes.checkpoints import last_checkpoint, remove_old_checkpoints, seal
from kvfold.recipes.data import Windows, collate
from kvfold.recipes.model import Trainee
from kvfold.recipes.recipe import Recipe
from kvfold.recipes.result import TRAINED

Log = Callable[[str], None]


def arguments(recipe: Recipe, folder: Path, processes: int, cpu: bool, steps: int) -> TrainingArguments:
    """What the Trainer has to know of a recipe whose rate is a number; checkpoints go into `folder`."""
    assert recipe.learning_rate != "auto"
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # the order of the windows already repeats them
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // (recipe.micro_batch * processes),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type={"cosine": "cosine", "constant": "constant_with_warmup"}[recipe.schedule],
        warmup_steps=math.ceil(recipe.warmup * steps),
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        use_cpu=cpu,
        seed=recipe.seed,
        logging_strategy="steps",
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # a loss that is not finite stops the run
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        save_strategy="steps",
        save_steps=recipe.eval_every,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not cpu,
        ddp_find_unused_parameters=False,
        log_level="error",
        log_level_replica="error",
    )
    args._n_gpu = 1  # several GPUs are accelerate's: without it, one is taken and no DataParallel
    return args


class Uptrainer(Trainer):
    """Trains a `Student` against a teacher that stays as it is.

    Args:
        trainee: the student and the measure of its parameters' steps.
        teacher: the original on the same device, None without one.
        held_out: (n, T) windows to evaluate on, as many for each process.
        log: called with a line at a time.
        logs: folder for TensorBoard, which is written where it is installed; None for none.
    """

    model: Any  # transformers allows None, before there is one
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        trainee: Trainee,
        teacher: PreTrainedModel | None,
        windows: Windows,
        held_out: Tensor,
        args: TrainingArguments,
        log: Log,
        logs: Path | None,
    ) -> None:
        self.trainee, self.teacher, self.windows, self.held_out = trainee, teacher, windows, held_out
        super().__init__(trainee.student, args, train_dataset=windows, eval_dataset=windows, data_collator=collate)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(ConsoleCallback(log, windows.window * args.train_batch_size * args.gradient_accumulation_steps))
        if logs is not None and is_tensorboard_available() and args.process_index == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.add_callback(TensorBoardCallback(SummaryWriter(logs)))
        self.stop = StopCallback()
        self.add_callback(self.stop)
        if teacher is not None:
            teacher.to(args.device)  # type: ignore[arg-type]

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.windows)  # the order is the dataset's own

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Adam whose step is `learning_rate` times each parameter's root mean square, as in healing."""
        if self.optimizer is None:
            groups = []
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    scale = self.trainee.scales[_plain(name)]
                    groups.append({"params": [parameter], "lr": self.args.learning_rate * scale})
            self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        return self._losses(model, inputs["input_ids"])["loss"]

    def _losses(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        if self.teacher is None:
            return model(input_ids=ids)
        with torch.no_grad(), self.accelerator.autocast():
            reference = last_states(self.teacher, ids)
        return model(input_ids=ids, reference=reference, teacher_head=self.teacher.get_output_embeddings())

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            step = self.state.global_step + 1
            good = self.state.global_step and last_checkpoint(Path(str(self.args.output_dir)))
            raise ConversionError(
                f"the loss is {float(loss)} at step {step} of {self.state.max_steps}; "
                + (f"the last good checkpoint is {good}: go on from it with --resume and " if good else "start again with ")
                + f"a lower learning_rate (now {self.args.learning_rate:g})"
                + (", or with bf16=false" if self.args.bf16 and not good else "")
            )
        return loss

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean losses over the held-out windows of all processes.

        Before the first step they are those of the checkpoint that was given, which the best step has to beat.
        Raises ConversionError when they are not finite then.
        """
        mine = self.held_out[self.args.process_index :: self.args.world_size]
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for ids in mine.split(self.args.train_batch_size):
            losses = self._losses(self.model, ids.to(self.args.device))
            sums += torch.stack([losses[key].double().cpu() for key in ("loss", "kl", "ce")]) * len(ids)
        sums = self.accelerator.reduce(sums.float().to(self.args.device), reduction="sum") / len(self.held_out)
        metrics = dict(zip(("eval_loss", "eval_kl", "eval_ce"), sums.tolist(), strict=True))
        self.log(metrics)
        if self.state.global_step == 0:
            self._set_bar(metrics["eval_loss"])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _set_bar(self, loss: float) -> None:
        if not math.isfinite(loss):
            remedy = "try bf16=false" if self.args.bf16 else "convert again"
            raise ConversionError(f"the held-out loss of the checkpoint is {loss} before the first step: {remedy}")
        self.state.best_metric, self.state.best_global_step = loss, 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Keep what learns and nothing else. Raises ConversionError when it is not finite any more."""
        if not self.args.should_save or output_dir is None:
            return
        held = self.model.state_dict() if state_dict is None else state_dict
        trained = {_plain(name): tensor for name, tensor in held.items() if _plain(name) in self.trainee.scales}
        broken = [name for name, tensor in trained.items() if not bool(tensor.isfinite().all())]
        if broken:
            raise ConversionError(
                f"{broken[0]} is not finite after step {self.state.global_step}: go on from the checkpoint before it with "
                f"--resume and a lower learning_rate (now {self.args.learning_rate:g})"
            )
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}, Path(output_dir) / TRAINED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer does, and sealed when all processes have written. Raises ConversionError when the disk is full."""
        folder = Path(str(self.args.output_dir))
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:  # torch and safetensors hide what the system said
            if isinstance(error, torch.OutOfMemoryError):
                raise
            free, line = shutil.disk_usage(folder).free, " ".join(str(error).split())
            raise ConversionError(
                f"saving a checkpoint in {folder} failed with {free:,} bytes free there ({line}): check the disk, "
                "then repeat with --resume"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder / f"checkpoint-{self.state.global_step}")
            remove_old_checkpoints(folder, self.state.best_global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # in shards, beside the whole ones
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.trainee.load(load_file(Path(resume_from_checkpoint) / TRAINED))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Steps go on with the learning rate asked for now: it may be lowered on the way."""
        if checkpoint is None:
            return
        wanted = list(self.lr_scheduler.base_lrs)
        super()._load_optimizer_and_scheduler(checkpoint)
        factors = [new / old for new, old in zip(wanted, self.lr_scheduler.base_lrs, strict=True)]
        for group, factor, peak in zip(self.optimizer.param_groups, factors, wanted, strict=True):
            group["lr"], group["initial_lr"] = group["lr"] * factor, peak
        self.lr_scheduler.base_lrs = wanted


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for part in ("module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


class ConsoleCallback(TrainerCallback):
    """A line for every entry of the log."""

    def __init__(self, log: Log, tokens_per_step: int) -> None:
        self.log, self.tokens, self.begun, self.first = log, tokens_per_step, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun, self.first = time.time(), state.global_step
        self.tokens *= args.world_size

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        where = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            self.log(f"{where}  held-out loss {logs['eval_loss']:.4f}, KL {logs['eval_kl']:.4f}, NLL {logs['eval_ce']:.4f}")
        elif "loss" in logs:
            speed = (state.global_step - self.first) * self.tokens / (time.time() - self.begun)
            self.log(f"{where}  loss {logs['loss']:.4f}, {speed:,.0f} tokens/s")


class StopCallback(TrainerCallback):
    """SIGTERM ends the run behind the current step, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        def ask(*_: Any) -> None:
            self.asked = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:  # the signal reaches processes at different times, and all must stop behind the same step
            flag = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(flag)
            self.asked = bool(flag)
        control.should_evaluate |= state.global_step >= state.max_steps  # the last step may be the best
        if self.asked:
            control.should_save = control.should_training_stop = True
