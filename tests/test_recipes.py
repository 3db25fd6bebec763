"""Recipes as files, their losses, their data, and every way in which an uptraining is refused."""

import math
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from datasets import load_from_disk
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import get_scheduler

import kvfold.recipes.losses as losses
from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source.data import load_windows
from kvfold.errors import UserError
from kvfold.recipes.data import evaluation_windows, pack, training_order
from kvfold.recipes.losses import Objective, divergence
from kvfold.recipes.recipe import SHIPPED, Recipe, headline, load_recipe, shipped
from kvfold.recipes.trainer import arguments

from .helpers import invoke, save_model, save_tokenizer, save_tokens

ACCELERATE = Path(losses.__file__).parent / "accelerate"


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(shipped()) == {"distill-lora", "distill-attention", "distill-kl", "ce-lora", "full"}
    code, listed = invoke("recipes")
    assert code == 0
    for name, path in shipped().items():
        assert f"{name} " in listed and headline(path) in listed
        text = path.read_text()
        assert f"--recipe {name} " in text and text.startswith("# ")
        assert invoke("recipes", "show", name) == (0, text)
    monkeypatch.chdir(tmp_path)
    assert invoke("recipes", "copy", "full") == (0, "full.yaml\n")
    assert load_recipe("full.yaml", []) == load_recipe("full", [])
    assert invoke("recipes", "copy", "full")[0] == 2
    assert invoke("recipes", "copy", "full", "--overwrite")[0] == 0
    code, message = invoke("recipes", "show", "distil-lora")
    assert code == 2 and "Did you mean distill-lora?" in message


def test_overrides_come_last_and_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    changed = load_recipe("distill-lora", ["learning_rate=1e-2", "tokens=2_000", "bf16=false", "top_k=8"])
    assert (changed.learning_rate, changed.tokens, changed.bf16, changed.top_k) == (0.01, 2000, False, 8)
    assert changed.model_dump(exclude={"learning_rate", "tokens", "bf16", "top_k"}) == load_recipe(
        "distill-lora", []
    ).model_dump(exclude={"learning_rate", "tokens", "bf16", "top_k"})
    with pytest.raises(UserError) as caught:
        load_recipe("distill-lora", ["lora_rnk=8", "batch=0", "train=all"])
    for said in ("unknown setting 'lora_rnk'. Did you mean lora_rank?", "batch: input should be", "train: input should be"):
        assert said in str(caught.value)
    for pair, said in (("tokens", "write key=value"), ("batch=6", "no multiple of micro_batch"), ("kl_weight=0", "both 0")):
        with pytest.raises(UserError, match=said):
            load_recipe("distill-lora", [pair, "ce_weight=0"])
    (tmp_path / "bad.yaml").write_text("- a\n")
    for path, said in ((tmp_path / "bad.yaml", "holds no settings"), (tmp_path / "none.yaml", "does not exist")):
        with pytest.raises(UserError, match=said):
            load_recipe(str(path), [])


def test_rates_and_schedules(tmp_path: Path) -> None:
    """Both rise alike; then one falls to zero and the other stays."""
    assert load_recipe("distill-lora", ["learning_rate=auto"]).learning_rate == "auto"
    for value in ("0", "fast"):
        with pytest.raises(UserError, match="learning_rate: value error, write a finite number above 0, or auto, got"):
            load_recipe("distill-lora", [f"learning_rate={value}"])
    for schedule, wanted in (("cosine", [0.2, 1.0, 0.5, 0.0]), ("constant", [0.2, 1.0, 1.0, 1.0])):
        recipe = load_recipe("distill-kl", [f"schedule={schedule}", "warmup=0.05", "learning_rate=0.001"])
        args = arguments(recipe, tmp_path, 1, True, 100)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, int(args.warmup_steps), 100)
        factors = [scheduler.lr_lambdas[0](step) for step in (1, 5, 52.5, 100)]
        assert factors == pytest.approx(wanted)


def test_every_setting_of_the_shipped_recipes_is_one(tmp_path: Path) -> None:
    for path in SHIPPED.glob("*.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= set(Recipe.model_fields)


@pytest.mark.parametrize(("name", "kind"), [("fsdp", DistributedType.FSDP), ("deepspeed", DistributedType.DEEPSPEED)])
def test_accelerate_configs_load(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kind
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    if name == "fsdp":
        from accelerate import FullyShardedDataParallelPlugin

        settings = {key.removeprefix("fsdp_"): value for key, value in config.fsdp_config.items()}
        settings["fsdp_version"] = settings.pop("version")
        plugin = FullyShardedDataParallelPlugin(**{k: v for k, v in settings.items() if k != "offload_params"})
        assert plugin.fsdp_version == 2 and "FULL_STATE_DICT" in str(plugin.state_dict_type)
    else:
        assert config.deepspeed_config["zero_stage"] == 2


def random_inputs(tokens: int = 40, vocab: int = 50, width: int = 12) -> tuple[Any, ...]:
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(width, vocab, bias=False), nn.Linear(width, vocab, bias=False)
    hidden, reference = torch.randn(2, tokens, width, requires_grad=True), torch.randn(2, tokens, width)
    return hidden, head, torch.randint(vocab, (2, tokens)), reference, teacher_head


def test_the_losses_are_those_of_their_definition() -> None:
    hidden, head, targets, reference, teacher_head = random_inputs()
    out = Objective(2.0, 0.5)(hidden, head, targets, reference, teacher_head)
    p, q = teacher_head(reference).softmax(-1).double(), head(hidden).softmax(-1).double()
    assert float(out["kl"]) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert float(out["ce"]) == pytest.approx(float(F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())), rel=1e-5)
    assert float(out["loss"]) == pytest.approx(2 * float(out["kl"]) + 0.5 * float(out["ce"]), rel=1e-6)
    alone = Objective(0.0, 1.0)(hidden, head, targets)
    assert float(alone["kl"]) == 0 and float(alone["loss"]) == pytest.approx(float(out["ce"]))


@pytest.mark.parametrize("top_k", [None, 5])
def test_pieces_change_neither_losses_nor_gradients(monkeypatch: pytest.MonkeyPatch, top_k: int | None) -> None:
    hidden, head, targets, reference, teacher_head = random_inputs()
    found = []
    for size in (256 << 20, 7 * 4 * 50):  # all at once, and seven tokens at a time
        monkeypatch.setattr(losses, "PIECE_BYTES", size)
        loss = Objective(1.0, 0.1, top_k)(hidden, head, targets, reference, teacher_head)["loss"]
        found.append((loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight])))
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-5)


def test_top_k_compares_the_likely_tokens_and_the_rest_as_one() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.15, 0.05]]), torch.tensor([[0.4, 0.2, 0.35, 0.05]])
    expected = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.4)
    assert float(divergence(p.log(), q.log(), 2)) == pytest.approx(expected, rel=1e-5)
    whole = float(divergence(p.log(), q.log()))
    assert float(divergence(p.log(), q.log(), 4)) == pytest.approx(whole)
    assert 0 < float(divergence(p.log(), q.log(), 1)) < float(divergence(p.log(), q.log(), 2)) < whole


def test_packing_gives_the_windows_of_calibration(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "model")
    (tmp_path / "a.txt").write_text("abcdefghij" * 30)
    (tmp_path / "b").mkdir()
    for name in ("1.md", "2.md"):
        (tmp_path / "b" / name).write_text(f"{name} und so weiter. " * 20)
    recipe = Recipe(train="lora", learning_rate=1, window=64, tokens=10_000)
    pack([f"{tmp_path}/a.txt", f"{tmp_path}/b"], tmp_path / "model", recipe, 258, tmp_path / "data")
    rows = torch.tensor(load_from_disk(str(tmp_path / "data"))["input_ids"])
    expected = [load_windows(f"{tmp_path}/{name}", tmp_path / "model", 64, 10_000).ids for name in ("a.txt", "b")]
    assert torch.equal(rows, torch.cat(expected))
    assert not (tmp_path / "data.cache").exists()


def test_the_order_follows_from_the_seed_and_repeats_nothing_within_a_pass() -> None:
    order = training_order(list(range(10, 30)), 15, 4, seed=3)
    assert len(order) == 60
    assert all(sorted(order[i : i + 20]) == list(range(10, 30)) for i in (0, 20, 40))
    assert order[:20] != order[20:40]
    assert order == training_order(list(range(10, 30)), 15, 4, seed=3) != training_order(list(range(10, 30)), 15, 4, seed=4)
    rows = [{"input_ids": [i] * 8} for i in range(50)]

    class Rows(list):
        def __getitem__(self, key: Any) -> Any:
            return {"input_ids": [rows[i]["input_ids"] for i in key]} if isinstance(key, list) else list.__getitem__(self, key)

    recipe = Recipe(train="lora", learning_rate=1, eval_tokens=24)
    training, held_out = evaluation_windows(None, Rows(rows), recipe, Path(), 128, 1)
    assert held_out.shape == (3, 8)
    assert not set(training) & set(held_out[:, 0].tolist()) and len(training) == 47


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    save_model(folder / "source", "llama")
    convert(str(folder / "source"), folder / "gqa", ConvertSettings(to="gqa", kv_heads=2))
    save_tokens(folder / "tokens.safetensors", 16, 32)
    save_tokens(folder / "wide.safetensors", 16, 300)
    save_tokens(folder / "foreign.safetensors", 16, 32, vocab=1000)
    save_file({"calibration": torch.zeros(0, 32, dtype=torch.int16)}, folder / "empty.safetensors")
    return folder


def refused(fold: Path, out: Path, *args: str, data: str = "tokens.safetensors:calibration", checkpoint: str = "gqa") -> str:
    """The message of a refusal, which must leave nothing behind."""
    code, message = invoke("uptrain", fold / checkpoint, out, "--data", f"{fold}/{data}", *args)
    assert code == 2, message
    assert message.count("\n") == 1
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return message


def test_what_is_refused(fold: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "is missing" in invoke("uptrain", fold / "gqa", out)[1]
    for data, said in {
        "nothing.safetensors:a": "does not exist",
        "empty.safetensors:calibration": "integer rows",
        "tokens.safetensors:nope": "no tensor 'nope'",
        "foreign.safetensors:calibration": "outside the model's vocabulary of 128",
        "wide.safetensors:calibration": "the source knows 128 positions",
        "tokens.safetensors:calibration,": "separated by single commas",
    }.items():
        assert said in refused(fold, out, "window=32", data=data)
    mixed = f"tokens.safetensors:calibration,{fold}/wide.safetensors:calibration"
    assert "windows of 300 ids and the text before it of 32" in refused(fold, out, data=mixed)
    assert "unknown setting 'lr'" in refused(fold, out, "lr=1")
    assert "unknown recipe 'distill'" in refused(fold, out, "--recipe", "distill")
    assert "makes no adapter" in refused(fold, out, "--recipe", "full", "--keep-adapter")
    assert "has no kvfold.json" in refused(fold, out, checkpoint="source")
    assert "does not exist here" in refused(fold, out, checkpoint="no such")
    save_tokens(fold / "one.safetensors", 1, 32)
    assert "gives 1 windows and 1 of them would be held out" in refused(fold, out, data="one.safetensors:calibration")


def test_a_teacher_of_another_vocabulary_is_refused(fold: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", "llama", vocab_size=256)
    said = refused(fold, tmp_path / "out", "--teacher", str(tmp_path / "other"))
    assert "has 128 tokens and the teacher" in said and "give the source" in said
    for name, merges in (("a", [("a", "b")]), ("b", [("c", "d")])):
        save_model(tmp_path / name, "llama", vocab_size=259)
        save_tokenizer(tmp_path / name, merges)
    convert(str(tmp_path / "a"), tmp_path / "fold", ConvertSettings(to="gqa", kv_heads=2))
    data = f"{fold}/tokens.safetensors:calibration"
    code, message = invoke("uptrain", tmp_path / "fold", tmp_path / "out", "--data", data, "--teacher", tmp_path / "b")
    assert code == 2 and "the tokenizers of" in message


def test_existing_output_is_kept(fold: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    data = f"{fold}/tokens.safetensors:calibration"
    for flags, said in (((), "pass --overwrite"), (("--overwrite",), "is not a checkpoint folder")):
        code, message = invoke("uptrain", fold / "gqa", tmp_path / "out", "--data", data, *flags)
        assert code == 2 and said in message
    code, message = invoke("uptrain", fold / "gqa", fold / "gqa", "--data", data, "--overwrite")
    assert code == 2 and "is the folded checkpoint itself" in message
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_too_little_memory_is_told_before_anything_is_read(fold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    said = refused(fold, tmp_path / "out", "window=128")
    assert "GiB on cpu (student 0.00, teacher 0.00" in said and "0.00 are free: lower micro_batch" in said


def test_a_damaged_record_is_told(fold: Path, tmp_path: Path) -> None:
    import json
    import shutil

    record = json.loads((fold / "gqa" / "kvfold.json").read_text())
    for change, said in (
        ({"settings": {**record["settings"], "kv_heads": 4}}, "holds another design than kvfold.json says"),
        ({"target": None}, "is damaged"),
        ({"settings": None}, "is damaged"),
    ):
        shutil.rmtree(tmp_path / "fold", ignore_errors=True)
        shutil.copytree(fold / "gqa", tmp_path / "fold")
        (tmp_path / "fold" / "kvfold.json").write_text(json.dumps({**record, **change}))
        code, message = invoke("uptrain", tmp_path / "fold", tmp_path / "out", "--data", "x.txt")
        assert code == 2 and said in message
