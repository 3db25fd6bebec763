"""The benchmark on real models, in miniature: what it measures, keeps, takes up again and shows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BENCHMARK = BENCHMARKS / "real_models.py"
sys.path.insert(0, str(BENCHMARKS))
import results  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_the_benchmark_measures_every_stage_once(shared: Path, tmp_path: Path) -> None:
    """TransMLA's way in closed form, healed and uptrained; what is there already is not made again."""
    source = shared / "models/stories260k"
    tokens = source / "tokens.safetensors"
    args = [source, "--on", f"{tokens}:evaluation", "--calibrate", f"{tokens}:calibration", "--out", tmp_path]
    args += ["--rows", "rorope", "--budgets", "50%", "--splits", "0.5", "--max-tokens", "4096"]
    args += ["--set", "heal_steps=4", "heal_batch_tokens=1024", "calibration_tokens=16384"]
    args += ["--publish", tmp_path]
    args += ["--uptrain", "tokens=16384", "eval_tokens=4096", "learning_rate=0.001"]

    def run(*more: Any) -> tuple[str, dict[str, Any]]:
        command = [sys.executable, str(BENCHMARK), *map(str, args), *more]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=1200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, json.loads((tmp_path / "results.json").read_text())

    _, before = run("--stages", "closed")
    printed, results = run("--stages", "closed,healed,uptrained")
    assert {key: results[key] for key in before} == before
    found = {(r["stage"], r["form"]["rope_dim"]): r for r in results.values() if "row" in r}
    # half of 32, one head, and an eighth of all heads; the best one is healed
    closed = {rope: r["damage_nats"] for (stage, rope), r in found.items() if stage == "closed"}
    assert set(closed) == {4, 8, 16}
    best = min(closed, key=lambda rope: closed[rope])
    assert set(found) == {*(("closed", rope) for rope in closed), ("healed", best), ("uptrained", best)}
    damages = [found[stage, best]["damage_nats"] for stage in ("closed", "healed", "uptrained")]
    assert damages[0] > damages[1] > damages[2] > 0
    healed = found["healed", best]
    assert healed["made"]["settings"]["heal_steps"] == 4 and healed["made"]["calibration_tokens"] > 15000
    assert healed["cache_numbers_per_token_per_layer"] == 32 and healed["made"]["peak_memory_bytes"] > 50 << 20
    assert healed["needles"] and healed["greedy"] and len(healed["damage_by_position"]) == 16
    cell = " → ".join(f"{damage:.3f}" for damage in damages) + f" ({32 - best} + {best})"
    assert f"| cache kept | 32 (50%) |\n|---|---:|\n| `rorope` (TransMLA) | {cell} |" in printed
    assert (tmp_path / "tables.md").read_text().strip() in printed
    assert (tmp_path / "stories260k.png").read_bytes()[:4] == b"\x89PNG"
    published = json.loads((tmp_path / "stories260k.json").read_text())
    name = f"rorope-{32 - best}+{best}-32-healed-4x1024"
    assert published[name]["damage_nats"] == healed["damage_nats"] and published[name]["tokens"] > 3000
    assert len(published) == 1 + len(found) and str(tmp_path) not in json.dumps(published)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_uptraining_is_measured_beside_the_source_fine_tuned(shared: Path, tmp_path: Path) -> None:
    """On two texts; without a teacher the source learns the text, and moves away from itself."""
    source = shared / "models/stories260k"
    tokens, fold = source / "tokens.safetensors", tmp_path / "gqa-2"
    convert(str(source), fold, ConvertSettings(to="gqa", kv_heads=2, method="mean"))
    stories = load_file(tokens)["uptraining"]  # its own samples, of which it has nothing to learn: half of them backwards
    backwards = torch.where((torch.arange(len(stories)) % 2 == 0)[:, None], stories, stories.flip(1))
    save_file({"both": backwards.contiguous()}, tmp_path / "learned.safetensors")
    texts = ["--data", f"{tmp_path}/learned.safetensors:both"]
    texts += ["--on", f"{tokens}:evaluation", "--second", f"{tokens}:calibration"]
    pairs = ["tokens=8192", "eval_tokens=2048", "learning_rate=0.0003", "eval_every=1", "device=cpu"]
    command = [sys.executable, BENCHMARKS / "uptraining.py", source, fold, *texts, "--out", tmp_path / "out"]
    command += ["--max-tokens", "4096", "--set", *pairs]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("on", "second"):
        results.keep(name, [tmp_path / "out" / f"{name}.json"], tmp_path)
        kept = json.loads((tmp_path / f"{name}.json").read_text())
        ways = ("32-closed-form", "32-uptrained-attention-kl-8224", "64-uptrained-attention-ce-8224")
        closed, uptrained, tuned = (kept[f"gqa-source-None-mean-{way}"] for way in ways)
        assert closed["damage_nats"] > uptrained["damage_nats"] and closed["kl"] > uptrained["kl"]
        assert abs(tuned["damage_nats"]) < 0.005 and 0 < tuned["kl"] < 0.01
        assert "uptraining" not in closed and uptrained["uptraining"][0]["tokens"] == 8224
        assert tuned["cache_numbers_per_token_per_layer"] == 64 and tuned["uptraining"][0]["kl_weight"] == 0
