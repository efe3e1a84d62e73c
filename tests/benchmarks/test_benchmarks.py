"""The benchmark measures what it says: the same work for everyone, counted tokens, phases that add up.

Times themselves are not tested. Driver and workers run on a tiny model, without the peers from other environments.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import BENCHMARKS
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(BENCHMARKS))  # scripts that import each other, no package

import bare_model
import freed_memory
import iteration
import measures
import peers
import reordered_weights
import report
import scaling
import worker
import workload as work
from workload import Workload

import textgym.engine.reordered_weights
import textgym.language_model

TINY = Workload(
    rows=4,
    prompt_tokens=3,
    new_tokens=4,
    hidden=32,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp=64,
    vocab=128,
    epochs=2,
    minibatches=2,
    threads=1,
    compile=False,
)
RAGGED = TINY.replace(new_tokens=16, ragged=True)


def iterated(name: str, workload: Workload) -> tuple[dict[str, float], dict[str, Any], Any]:
    """Seconds by phase, what was reported beside, and the contender, after two iterations in this process."""
    contender, clock = worker.build(name, workload), measures.Clock("cpu")
    for _ in range(2):
        clock.start()
        facts = contender.iterate(clock)
    return clock.seconds, facts, contender


# The work


def test_workload_survives_json() -> None:
    assert Workload.from_json(RAGGED.to_json()) == RAGGED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows=0 must be a whole number, at least 1"),
        ({"rows": 5}, "rows=5 must be a multiple of minibatches=2"),
        ({"dtype": "float16"}, "dtype='float16' must be"),
        ({"heads": 3}, "heads=3 must divide hidden=32"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3 must divide heads"),
        ({"ragged": True}, "new_tokens=4 must be a multiple of 4, and more"),
        ({"ragged": True, "new_tokens": 10}, "new_tokens=10 must be a multiple of 4"),
    ],
)
def test_impossible_workloads_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


def test_preset_has_the_size_of_smollm2_135m() -> None:
    preset = work.PRESETS["135m"]
    weights = preset.trunk_parameters + preset.vocab * preset.hidden
    norms = (2 * preset.layers + 1) * preset.hidden
    assert weights + norms == 134_515_008


def test_trunk_parameters_are_the_models_own() -> None:
    matrices = [p for p in work.language_model(TINY).model.layers.parameters() if p.ndim == 2]
    assert sum(p.numel() for p in matrices) == TINY.trunk_parameters


def test_prompts_are_of_one_length_as_ids_and_as_texts() -> None:
    ids = work.prompt_ids(TINY, 8)
    assert {len(row) for row in ids} == {TINY.prompt_tokens}
    assert work.tokenizer(TINY)(work.prompt_texts(TINY, 8))["input_ids"] == ids


@pytest.mark.parametrize("tied", [False, True])
def test_end_of_sequence_has_its_probability_at_every_place(tied: bool) -> None:
    model = work.language_model(RAGGED.replace(tied=tied))
    ids = torch.randint(4, RAGGED.vocab, (16, 19))
    with torch.no_grad():
        probability = model(ids).logits.softmax(-1)[..., work.EOS]  # (16, 19)
    assert probability.mean().item() == pytest.approx(RAGGED.end_probability, rel=0.1)
    assert probability.std().item() < 0.1 * RAGGED.end_probability


def test_ragged_completions_of_generate_have_the_expected_mean_length() -> None:
    rows = 400
    tokens = bare_model.Generate(RAGGED.replace(rows=rows)).iterate(measures.Clock("cpu"))["tokens"]
    # A geometric length of mean 4, cut at 16, has standard deviation 3.3.
    assert tokens / rows == pytest.approx(RAGGED.expected_length, abs=4 * 3.3 / rows**0.5 + 0.1)


def test_ragged_completions_of_textgym_have_the_expected_mean_length() -> None:
    contender = worker.build("textgym", RAGGED.replace(rows=16, steps=64, epochs=1))
    contender.collect(measures.Clock("cpu"))
    lengths = [episode["l"] for episode in contender.model.finished_episodes]
    assert max(lengths) <= RAGGED.new_tokens
    assert statistics.mean(lengths) == pytest.approx(RAGGED.expected_length, abs=4 * 3.3 / len(lengths) ** 0.5)


def test_expected_length_is_that_of_a_geometric_distribution_cut_at_the_budget() -> None:
    p, budget = RAGGED.end_probability, RAGGED.new_tokens
    lengths = [n * p * (1 - p) ** (n - 1) for n in range(1, budget)] + [budget * (1 - p) ** (budget - 1)]
    assert RAGGED.expected_length == pytest.approx(sum(lengths))


def test_real_tokens_end_with_the_first_end_of_sequence() -> None:
    end = work.EOS
    completions = torch.tensor([[7, 7, end, 7, end], [end, 7, 7, 7, 7], [7, 7, 7, 7, 7], [7, 7, 7, 7, end]])
    assert work.real_tokens(completions) == 3 + 1 + 5 + 5


def test_memory_bound_counts_each_weight_once_a_step() -> None:
    one = TINY.replace(rows=2, prompt_tokens=1, new_tokens=2)
    weights = one.trunk_parameters + one.hidden * one.vocab
    cache = 2 * 2 * (one.layers * 2 * 16)  # rows, places on average, keys and values of one head of 16
    assert one.memory_bound_tokens_per_s(1.0) == pytest.approx(2 / (4 * (weights + cache)))


# The contenders


@pytest.mark.parametrize("shape", [TINY, RAGGED], ids=["fixed", "ragged"])
@pytest.mark.parametrize(
    "name", ["textgym", "textgym-compiled", "textgym-fast", "textgym-instant", "sb3", "floor-bf16"]
)
def test_contenders_spend_time_in_the_phases_they_cover(name: str, shape: Workload) -> None:
    seconds, facts, contender = iterated(name, shape)
    spent = {phase for phase, value in seconds.items() if value > 0}
    covered = set(contender.covers) - ({"score"} if name == "textgym-instant" else set())
    assert spent == covered
    assert facts["tokens"] == shape.rows * shape.rollout_steps


class CountedOperations(TorchDispatchMode):
    """Counts what torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["textgym", "textgym-instant", "floor-fp32", "generate"])
def test_phases_are_all_of_an_iteration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = worker.build(name, TINY)
    with CountedOperations() as operations:
        # A time that goes on with what is computed: an operation takes a second.
        monkeypatch.setattr(measures.Clock, "_now", lambda clock: (operations.count, 2 * operations.count))
        clock = measures.Clock("cpu")
        contender.iterate(clock)
    assert operations.count > 100
    assert 0.99 * operations.count < sum(clock.seconds.values()) <= operations.count
    assert sum(clock.cpu.values()) == 2 * sum(clock.seconds.values())


@pytest.mark.parametrize("steps", [0, 16])
@pytest.mark.parametrize("shape", [TINY, RAGGED], ids=["fixed", "ragged"])
def test_floor_trains_exactly_the_counted_tokens(shape: Workload, steps: int) -> None:
    shape = shape.replace(steps=steps)
    floor = bare_model.Floor(shape, "float32")
    trained = []
    floor.policy.lm_head.register_forward_hook(
        lambda module, args, out: trained.append(args[0].shape[:-1].numel()) if out.requires_grad else None
    )
    facts = floor.iterate(measures.Clock("cpu"))
    assert facts["tokens"] == shape.rows * shape.rollout_steps
    assert facts["trained_tokens"] == sum(trained) == shape.epochs * facts["tokens"]
    assert set(trained) == {shape.minibatch_tokens}


def test_floor_decodes_the_logits_of_one_whole_forward() -> None:
    floor = bare_model.Floor(TINY, "float32")
    seen: list[torch.Tensor] = []
    floor.policy.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.inference_mode():
        bare_model.decode(floor.policy, floor.ids, TINY.prompt_tokens)
        decoded = torch.stack(seen, 1)  # (B, T, V)
        whole = floor.policy(floor.ids).logits[:, TINY.prompt_tokens - 1 : -1]
    torch.testing.assert_close(decoded, whole, atol=1e-5, rtol=1e-4)


def test_floor_compiles_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # a compiler takes its time
    floor = bare_model.Floor(TINY, "float32")
    seen: list[torch.Tensor] = []
    floor.policy.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.inference_mode():
        for _ in range(2):  # the second time over a used cache
            seen.clear()
            bare_model.compiled_decode(floor.policy, floor.ids, TINY.prompt_tokens)
        decoded = torch.stack(seen, 1)  # (B, T, V)
        whole = floor.policy(floor.ids).logits[:, TINY.prompt_tokens - 1 : -1]
    torch.testing.assert_close(decoded, whole, atol=1e-5, rtol=1e-4)


def test_unknown_contender_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="contender='typo' must be one of generate, .* sb3"):
        worker.build("typo", TINY)


# Driver and workers


# A worker that does nothing: what the driver asks of it is in its log. Importing what real ones need takes seconds.
IDLE = """
import json, sys, time

print(sys.argv[1:], file=sys.stderr)
if "nowhere" in sys.argv[-1]:
    raise RuntimeError("there is no device nowhere")
print(json.dumps({"ready": {"covers": ["rollout"]}}), flush=True)
for line in sys.stdin:
    print(line.strip(), file=sys.stderr)
    if "stop" in line:
        print(json.dumps({"memory": {"resident": 7}}), flush=True)
        break
    print(json.dumps({"tokens": 3, "at": time.monotonic()}), flush=True)
"""


@pytest.fixture
def idle_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(IDLE)
    monkeypatch.setattr(iteration, "FOLDER", tmp_path)


def test_real_workers_answer_and_the_table_has_them_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contenders = ["textgym", "floor-fp32"]
    results = iteration.measure(TINY, contenders, 2, tmp_path / "logs")
    for name in contenders:
        assert len(results[name]["rounds"]) == 2
        for answer in results[name]["rounds"]:
            assert answer["tokens"] == TINY.rows * TINY.new_tokens
            assert sum(answer["seconds"].values()) <= answer["wall"]
        assert 2**25 < results[name]["memory"]["resident"] < 2**33

    text = report.write_report([(TINY, results)], "small", 2, tmp_path)
    for name in contenders:
        assert f"| fixed | {name} |" in text
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert Workload(**record["works"][0]["workload"]) == TINY
    assert set(record["works"][0]["contenders"]) == set(contenders)
    assert (tmp_path / "benchmark.md").read_text() == text
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    assert "round 2 of 2" in capsys.readouterr().err


@pytest.mark.parametrize(("alone", "asked"), [(False, ["go", "go", "go", "stop"]), (True, ["go", "go", "stop"])])
def test_alone_each_turn_begins_anew(
    alone: bool, asked: list[str], idle_workers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = iteration.measure(TINY, ["generate"], 2, tmp_path, alone=alone)
    assert results["generate"]["memory"] == {"resident": 7}
    assert [answer["tokens"] for answer in results["generate"]["rounds"]] == [3, 3], "the first is to warm up"
    assert "fixed: round 2 of 2 ...\n" in capsys.readouterr().err
    _, *lines = (tmp_path / "fixed-generate.log").read_text().splitlines()  # of the newest process
    assert [word for line in lines for word in json.loads(line)] == asked


def test_kept_and_given_back_memory_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Logits and the gradient of the head are blocks of 32 MiB and more.
    monkeypatch.setitem(work.PRESETS, "small", TINY.replace(vocab=131_072, epochs=1, minibatches=1))
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(freed_memory, "cores", torch.get_num_threads)
    flags = ["--preset", "small", "--rows", "16", "--rounds", "1", "--iterations", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["freed_memory.py", *flags])
    freed_memory.main()
    answers = json.loads((tmp_path / "freed_memory.json").read_text())["answers"]
    assert len(answers["kept"]) == len(answers["given back"]) == 1
    if sys.platform == "linux":
        assert answers["kept"][0]["pages"] < answers["given back"][0]["pages"] / 2
    table = capsys.readouterr().out
    assert "| kept |" in table
    assert "| given back |" in table


def test_rollouts_are_compared_with_and_without_reordered_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers: list[int] = []

    class Noted(textgym.language_model.ReorderedWeights):
        def forget(self) -> None:
            layers.append(len(self))
            super().forget()

    monkeypatch.setattr(textgym.language_model, "ReorderedWeights", Noted)
    monkeypatch.setattr(textgym.engine.reordered_weights, "SMALLEST", 1)
    monkeypatch.setattr(reordered_weights, "cores", torch.get_num_threads)
    monkeypatch.setitem(work.PRESETS, "small", TINY)
    flags = ["--preset", "small", "--rounds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["reordered_weights.py", *flags])
    reordered_weights.main()
    assert layers == [0, 2 * 7 + 1] * 3, "all layers' weights in every other rollout"
    rollouts = json.loads((tmp_path / "reordered_weights.json").read_text())["rollouts"]
    assert {way: len(times) for way, times in rollouts.items()} == dict.fromkeys(
        ("as they are", "reordered", "generate (transformers)"), 2
    )
    assert "| reordered |" in capsys.readouterr().out


def test_contenders_take_turns_and_each_begins_a_round(idle_workers: None, tmp_path: Path) -> None:
    results = iteration.measure(TINY, ["textgym", "generate"], 2, tmp_path)
    answers = [(answer["at"], name) for name, result in results.items() for answer in result["rounds"]]
    assert [name for _, name in sorted(answers)] == ["generate", "textgym", "textgym", "generate"]


def test_failed_contender_is_named_with_its_log(
    idle_workers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = TINY.replace(device="nowhere")
    results = iteration.measure(broken, ["generate"], 1, tmp_path)
    assert "generate ended with exit code 1" in results["generate"]["failed"]
    assert "there is no device nowhere" in results["generate"]["failed"]  # its own words, from the log
    assert "| fixed | generate | failed |" in report.table([(broken, results)])
    assert "exit code 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    not (peers.FOLDER / "trl" / "bin" / "python").exists(), reason="needs TRL: python benchmarks/peers.py"
)
@pytest.mark.parametrize("name", ["trl-ppo", "trl-grpo", "trl-rloo"])
def test_trl_does_the_same_work(name: str, tmp_path: Path) -> None:
    shape = TINY.replace(new_tokens=8)
    results = iteration.measure(shape, [name], 1, tmp_path)
    (answer,) = results[name]["rounds"]
    assert answer["tokens"] == shape.rows * shape.new_tokens
    assert min(answer["seconds"].values()) > 0
    assert sum(answer["seconds"].values()) == pytest.approx(answer["wall"], rel=0.3, abs=0.05)


def test_flags_make_workloads() -> None:
    parsed = iteration.parse(["--preset", "135m", "--ragged", "--rows", "8", "--threads", "1", "--eager"])
    assert parsed.workloads == [
        work.PRESETS["135m"].replace(ragged=True, rows=8, threads=1, compile=False),
    ]
    assert [w.name for w in iteration.parse([]).workloads] == ["fixed", "ragged"]
    assert iteration.parse(["--contenders", "sb3,generate"]).contenders == ("sb3", "generate")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contenders", "textgym,typo"], "typo unknown"),
        (["--rows", "7"], "rows=7 must be a multiple"),
        (["--rounds", "0"], "--rounds=0 must be at least 1"),
    ],
)
def test_impossible_flags_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        iteration.parse(flags)
    assert message in capsys.readouterr().err


# The report


def result(
    covers: tuple[str, ...], seconds: tuple[float, float, float], tokens: int, memory: int, cpu_share: float = 1.0
) -> dict[str, Any]:
    """One that a worker might have given, with three rounds of which the middle one is the median."""
    rounds = []
    for scale in (0.5, 1.0, 4.0):
        times = {p: scale * s * (p in covers) for p, s in zip(measures.PHASES, seconds, strict=True)}
        decode = tokens / times["rollout"] if times["rollout"] else None
        cpu = {p: cpu_share * s for p, s in times.items()}
        rounds.append({"seconds": times, "cpu": cpu, "tokens": tokens, "decode_tokens_per_s": decode})
    return {"covers": list(covers), "rounds": rounds, "memory": {"resident": memory}}


@pytest.fixture
def results() -> report.Results:
    return {
        "textgym": result(measures.PHASES, (1.0, 1.0, 2.0), 100, 10),
        "floor-fp32": result(measures.PHASES, (1.0, 1.0, 1.5), 100, 10),
        "generate": result(("rollout",), (3.0, 0.0, 0.0), 200, 10),
        "trl-ppo": result(measures.PHASES, (2.0, 2.0, 3.0), 100, 20, cpu_share=0.5),
        "textgym-fast": {"rounds": [], "failed": "gone"},
    }


def test_ratios_are_of_seconds_per_token_over_common_phases(results: report.Results) -> None:
    figures = report.figures_of(results)
    assert figures["textgym"].total == 4.0
    assert figures["textgym"].tokens_per_s == 25.0
    assert report.times_as_long(figures["trl-ppo"], figures["textgym"]) == pytest.approx(7 / 4)
    assert report.times_as_long(figures["generate"], figures["textgym"]) == pytest.approx(1.5)  # twice the tokens
    assert report.times_as_long(figures["trl-ppo"], figures["textgym"], kind="cpu") == pytest.approx(3.5 / 4)


def test_bars_are_met_missed_or_not_measured(results: report.Results) -> None:
    bars = {bar.what: bar for bar in report.bars_of(TINY, results, "small")}
    against_trl = bars["iteration, textgym against TRL PPO"]
    assert against_trl.measured == pytest.approx(1.75)
    assert against_trl.met is False
    assert bars["iteration, textgym over floor-fp32"].met is True  # 4 / 3.5
    assert bars["rollout, textgym against generate"].met is True
    assert bars["peak memory, textgym over TRL PPO"].measured == 0.5
    for missing in ("iteration, fastest setting against TRL PPO", "update against SB3's over prefixes"):
        assert bars[missing].measured is None
        assert bars[missing].met is None
    assert bars["update against SB3's over prefixes"].wanted == TINY.new_tokens / 2


def test_ragged_bar_is_higher(results: report.Results) -> None:
    wanted = [bar.wanted for bar in report.bars_of(RAGGED, results, "small")]
    assert wanted == [6.0] * 3 + [1.25] * 3
    assert [bar.wanted for bar in report.bars_of(RAGGED, results, "135m")] == [2.0] * 3 + [1.25] * 3


# Scaling


def test_slope_is_the_exponent() -> None:
    points = [scaling.Point(x, {"rollout": 3.0 * x**1.5}, {}, {}) for x in (8, 16, 32, 64)]
    assert scaling.slope(points, "seconds", "rollout") == pytest.approx(1.5)


def test_counted_forwards_follow_the_arithmetic() -> None:
    base = TINY.replace(epochs=1, minibatches=1)
    for changes in ({}, {"new_tokens": 12}, {"rows": 8}):
        shape = base.replace(**changes)
        measured, least = scaling.measure(shape, 0, 1), scaling.arithmetic(shape, 0)
        assert measured.forwards["update"] == least.forwards["update"]
        assert measured.tokens["update"] == least.tokens["update"]
        # New episodes begin at the end of a rollout: their prompts are read, too.
        assert least.forwards["rollout"] <= measured.forwards["rollout"] <= least.forwards["rollout"] + 4
        assert measured.forwards["score"] == least.forwards["score"]


def test_growth_faster_than_the_arithmetic_does_not_fit() -> None:
    assert scaling.Slope("forwards", "update", 0.0, 0.0).fits
    assert not scaling.Slope("forwards", "update", 1.0, 0.0).fits
    assert scaling.Slope("seconds", "update", 1.2, 1.0).fits
    assert not scaling.Slope("seconds", "update", 2.0, 1.0).fits


def test_scaling_writes_a_table_for_each_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "QUICK", {"new_tokens": (4, 8), "vocab": (64, 128)})
    flags = ["--quick", "--repeats", "1", "--threads", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
    assert scaling.main() == 0
    text = (tmp_path / "scaling.md").read_text()
    for axis, value in itertools.product(("new_tokens", "vocab"), ("*slope*", "*arithmetic*")):
        assert axis in text
        assert value in text
    assert set(json.loads((tmp_path / "scaling.json").read_text())) == {"new_tokens", "vocab"}
