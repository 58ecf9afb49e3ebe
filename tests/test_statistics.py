"""The bootstrap against exact and simulated truths, and `ris-bench compare` from end to end."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import STAND_IN

from ris_bench import cli, evaluation, metrics
from ris_bench.errors import UserError
from ris_bench.experiment import Experiment, load
from ris_bench.protocols import RIS_BENCH
from ris_bench.records import Provenance, Result, Trial
from ris_bench.report import statistics
from ris_bench.report.statistics import bootstrap, check_same, difference, holm, ordered, ratios, seed_noise, sums
from ris_bench.results import Store

NAMES = ("miou", "oiou", "pr@0.5")


def expressions(image_N, intersection_N, union_N) -> pd.DataFrame:
    number = np.arange(len(image_N))
    return pd.DataFrame(
        {
            "dataset": "refcoco",
            "split": "val",
            "ref_id": number,
            "sentence_index": 0,
            "image_id": np.asarray(image_N),
            "expression": [f"the {n}th" for n in number],
            "target": 20 + number,
            "intersection": np.asarray(intersection_N),
            "union": np.asarray(union_N),
        }
    )


def scores(frame: pd.DataFrame) -> list[float]:
    """Of NAMES, as evaluations compute them."""
    found = metrics.scores(frame["intersection"].to_numpy(), frame["union"].to_numpy(), RIS_BENCH)
    return [found.miou, found.oiou, found.precision_at["0.5"]]


def two_methods(images: int = 40, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    generator = np.random.default_rng(seed)
    image_N = np.repeat(np.arange(images), generator.integers(1, 9, images))
    union_N = generator.integers(100, 50_000, len(image_N))
    first, second = (
        expressions(image_N, (union_N * generator.beta(a, 2, len(image_N))).astype(int), union_N) for a in (3, 4)
    )
    return first, second


def compared(first: pd.DataFrame, second: pd.DataFrame, resamples: int = 500, seed: int = 0) -> list:
    numerators, denominators, _ = zip(*(sums(ordered(frame), NAMES) for frame in (first, second)), strict=True)
    numerator_ITM, denominator_ITM = np.stack(numerators, axis=1), np.stack(denominators, axis=1)
    measured_TM = ratios(np.ones((1, len(numerator_ITM))), numerator_ITM, denominator_ITM)[0]
    values_RTM = bootstrap(numerator_ITM, denominator_ITM, resamples=resamples, seed=seed)
    return [difference(a - b, values_RTM[:, 0, m] - values_RTM[:, 1, m]) for m, (a, b) in enumerate(measured_TM.T)]


# Three images with two, one and one expressions; the intersections of two methods, whose unions are not the same.
IMAGE = [7, 7, 3, 9]
FIRST = expressions(IMAGE, [60, 90, 10, 300], [100, 100, 40, 400])
SECOND = expressions(IMAGE, [50, 80, 30, 200], [100, 100, 60, 400])


def test_it_agrees_with_every_resample_of_three_images():
    assert scores(FIRST) == pytest.approx([(0.6 + 0.9 + 0.25 + 0.75) / 4, 460 / 640, 3 / 4])
    draws = list(product((3, 7, 9), repeat=3))
    weights_RI = np.array([[draw.count(image) for image in (3, 7, 9)] for draw in draws])
    exact = {}
    for name, frame in (("first", FIRST), ("second", SECOND)):
        taken = [pd.concat([frame[frame["image_id"] == image] for image in draw]) for draw in draws]
        exact[name] = np.array([scores(each) for each in taken])
        numerator_IM, denominator_IM, number = sums(ordered(frame), NAMES)
        assert number == 4
        assert ratios(weights_RI, numerator_IM, denominator_IM) == pytest.approx(exact[name], abs=1e-15)

    # Of 27 equally probable differences the extremes are beyond any percentile: 1 / 27 is more than 0.025.
    exact_RM = exact["first"] - exact["second"]
    for found, exact_R in zip(compared(FIRST, SECOND, 20_000), exact_RM.T, strict=True):
        assert (found.low, found.high) == pytest.approx((exact_R.min(), exact_R.max()))
        p = min(1, 2 * min((exact_R <= 1e-12).mean(), (exact_R >= -1e-12).mean()))
        assert found.p == pytest.approx(p, abs=0.03)
    assert [found.value for found in compared(FIRST, SECOND)] == pytest.approx(
        np.subtract(scores(FIRST), scores(SECOND))
    )

    values_RM = bootstrap(*sums(ordered(FIRST), NAMES)[:2], resamples=20_000, seed=1)
    for value in np.unique(exact["first"][:, 0].round(9)):
        share = (values_RM[:, 0].round(9) == value).mean()
        assert share == pytest.approx((exact["first"][:, 0].round(9) == value).mean(), abs=0.015)


def test_intervals_cover_what_they_claim():
    """500 data sets of 150 images, whose expressions share the image, the object's size and its difficulty."""
    data_sets, images, generator = 500, 150, np.random.default_rng(0)
    number = generator.integers(1, 13, data_sets * images)
    image_N = np.repeat(np.arange(data_sets * images), number)
    difficulty = generator.normal(size=data_sets * images)
    area = np.minimum(50 + generator.lognormal(9.5, 1, data_sets * images), 640 * 480 / 2)
    expression_N = generator.normal(scale=0.7, size=len(image_N))
    parts = []
    for skill in (0.5, 0.7):
        own = difficulty + generator.normal(scale=0.4, size=data_sets * images) + 0.03 * skill * number
        logit_N = skill + np.repeat(own, number) + expression_N + generator.normal(scale=0.5, size=len(image_N))
        union_N = (np.repeat(area, number) * (1 + generator.random(len(image_N)))).astype(int)
        frame = expressions(image_N, (union_N / (1 + np.exp(-logit_N))).astype(int), union_N)
        parts.append(sums(frame, NAMES))
    numerator_TM, denominator_TM = (np.stack([part[side].sum(0) for part in parts]) for side in (0, 1))
    first, second = numerator_TM / denominator_TM  # of 75,000 images: the truth, but for a 20th of an interval's width
    numerator, denominator = (
        np.stack([part[side].reshape(data_sets, images, -1).swapaxes(0, 1) for part in parts], axis=1)
        for side in (0, 1)
    )
    covered = np.zeros((data_sets, len(NAMES)))
    for some in np.split(np.arange(data_sets), 20):  # each with draws of their own
        drawn = bootstrap(numerator[:, :, some], denominator[:, :, some], resamples=1000, seed=int(some[0]))
        for place, metric in np.ndindex(len(some), len(NAMES)):
            found = difference(0.0, drawn[:, 0, place, metric] - drawn[:, 1, place, metric])
            covered[some[place], metric] = found.low <= first[metric] - second[metric] <= found.high
    assert ((covered.mean(0) >= 0.93) & (covered.mean(0) <= 0.97)).all(), covered.mean(0)


def test_more_expressions_of_the_same_images_tell_no_more():
    first, second = two_methods()
    repeated = [
        pd.concat([frame.assign(sentence_index=i) for i in range(4)], ignore_index=True) for frame in (first, second)
    ]
    for once, often in zip(compared(first, second), compared(*repeated), strict=True):
        assert often == pytest.approx(once)


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    first, second = two_methods()
    found = compared(first, second)
    assert compared(first.sample(frac=1, random_state=1), second.sample(frac=1, random_state=2)) == found
    other = compared(first, second, seed=1)
    assert [each.value for each in other] == [each.value for each in found]
    assert all(a.low != b.low for a, b in zip(found, other, strict=True))


def test_how_many_resamples_are_made_at_a_time_does_not_matter(monkeypatch):
    found = compared(*two_methods())
    monkeypatch.setattr(statistics, "_WEIGHTS", 123)
    assert [pytest.approx(each, abs=1e-12) for each in compared(*two_methods())] == found


def test_a_method_does_not_differ_from_itself():
    first, _ = two_methods()
    assert compared(first, first) == [(0.0, 0.0, 0.0, 1.0)] * 3


def test_p_is_small_exactly_where_the_interval_leaves_out_zero():
    generator = np.random.default_rng(0)
    for shift in np.linspace(1.8, 2.1, 61):  # around 1.96
        found = difference(shift, generator.normal(shift, size=3999))
        assert (found.p <= 0.05) == (found.low > 0)
    assert difference(9.0, np.full(999, 9.0)).p == statistics.smallest_p(999) == 0.002


def test_empty_unions_are_worth_what_the_protocol_says():
    nothing = expressions([1, 2], [0, 0], [0, 0])
    assert compared(nothing, nothing) == [(0.0, 0.0, 0.0, 1.0)] * 3


def test_holm():
    # Ascending: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def test_seed_noise():
    quantiles = {1: 12.7062, 2: 4.3027, 4: 2.7764, 10: 2.2281, 120: 1.9799}
    assert {n: statistics.student(n) for n in quantiles} == pytest.approx(quantiles, abs=1e-4)
    # Variances 1 and 1 of three seeds each: four degrees of freedom.
    assert seed_noise([1, 2, 3], [4, 5, 6]) == pytest.approx(2.7764 * (2 / 3) ** 0.5, abs=1e-4)
    assert seed_noise([1, 2, 3], [5, 5, 5]) == pytest.approx(4.3027 * (1 / 3) ** 0.5, abs=1e-4)
    assert seed_noise([1, 1], [2, 2]) == 0
    assert seed_noise([1, 2, 3], [4]) is None


def with_cell(column: str, value) -> pd.DataFrame:
    frame = FIRST.copy()
    frame.loc[2, column] = value
    return frame


@pytest.mark.parametrize(
    "other, what",
    [
        (FIRST[:3], "1 only in ours, as dataset refcoco, image_id 9, ref_id 3, sentence_index 0;"),
        (with_cell("sentence_index", 5), "1 only in ours, as .* sentence_index 0 and 1 only in theirs, as .*_index 5;"),
        (with_cell("image_id", 1), "image_id 3, .* and 1 only in theirs, as dataset refcoco, image_id 1,"),
        (with_cell("target", 21), "number of ground-truth pixels of 1 differs, as 22 and 21 of .* ref_id 2"),
        (with_cell("expression", "it"), "text of 1 differs, as 'the 2th' and 'it' of .* ref_id 2"),
    ],
)
def test_other_expressions_are_refused(other, what):
    check_same(ordered(FIRST), ordered(SECOND), ("ours", "theirs"))
    with pytest.raises(
        UserError, match=f"^ours and theirs were not evaluated on the same expressions: .*?{what}"
    ) as error:
        check_same(ordered(FIRST), ordered(other), ("ours", "theirs"))
    assert "\n" not in str(error.value)


def test_an_expression_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        ordered(pd.concat([FIRST, FIRST[:1]]))


TEXT = (
    STAND_IN.replace("Stand-ins", "Stand-ins | 1").replace(", splits: [val]", "")
    + """\
grid:
  dataset: [refcoco, refcoco+]
  method: [frozen, lora, bridger, coop, full]
  seed: [0, 1, 2]
table:
  rows: method
  labels: {frozen: Fix Backbone, lora: "Lo|RA"}
  columns:
    - {header: "Params", value: params.tunable_backbone}
    - {header: RefCOCO, value: miou, where: {dataset: refcoco}, splits: [val, testA]}
    - {header: RefCOCO, value: oiou, where: {dataset: refcoco}, splits: [testA]}
    - {header: RefCOCO+, value: miou, where: {dataset: refcoco+}, splits: [testA]}
"""
)


def predictions(trial: Trial, split: str) -> pd.DataFrame:
    """LoRA is always a little better than frozen, CoOp is the same, and Bridger is as much better or worse by seed."""
    generator = np.random.default_rng(len(split))
    image_N = np.repeat(np.arange(60), generator.integers(1, 6, 60))
    union_N = generator.integers(1000, 50_000, len(image_N))
    share_N = generator.uniform(0.3, 0.8, len(image_N)) + 0.001 * trial.seed
    share_N += {"lora": 0.05, "bridger": 0.05 + 0.1 * (trial.seed - 1)}.get(trial.method.name, 0.0)
    return expressions(image_N, (union_N * share_N).astype(int), union_N).assign(
        dataset=trial.dataset.name, split=split
    )


def keep(store: Store, trial: Trial, frames: dict[str, pd.DataFrame]) -> Path:
    """A finished trial in the results folder."""
    result = Result(
        trial=trial,
        status="done",
        error=None,
        scores={split: evaluation.scores(frame) for split, frame in frames.items()},
        selected_epoch=1,
        history=(),
        params=None,
        cost=None,
        provenance=Provenance(commit=None, dirty=None, versions={}, weights={}, precision="fp32", started="2026-03-04"),
    )
    folder = store.begin(trial)
    evaluation.write(frames, folder / "expressions.parquet")
    store.finish(folder, result)
    return store.folder(trial)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An experiment and the results of its trials; full has none, and CoOp none on RefCOCO+."""
    root = tmp_path_factory.mktemp("finished")
    (root / "stand_in.yaml").write_text(TEXT)
    for run in load(root / "stand_in.yaml").runs:
        trial = run.trial
        if trial.method.name != "full" and (trial.dataset.name, trial.method.name) != ("refcoco+", "coop"):
            keep(Store(root / "results"), trial, {split: predictions(trial, split) for split in run.splits})
    return root


@pytest.fixture
def bench(finished, tmp_path, monkeypatch, capsys):
    """Calls `ris-bench compare` on a copy of them, and gives (code, stdout, stderr)."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["compare", "stand_in.yaml", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def folder(tmp_path: Path, method: str, seed: int, dataset: str = "refcoco") -> Path:
    [found] = (tmp_path / "results" / "trials").glob(f"{dataset}.*.{method}.s{seed}.*")
    return found


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.replace("\\|", "¦").split("|")[1:-1]] for line in lines]


def test_the_verb(bench):
    code, out, err = bench("--against", "frozen", "--resamples", "2000")
    assert (code, err) == (0, "")
    assert out.startswith("**Stand-ins \\| 1: against Fix Backbone**\n\n| Dataset")
    head, *body = rows(out)
    assert head[:6] == ["Dataset", "Split", "Metric", "Method", "Difference", "95% interval"]
    assert head[6:] == ["p", "p (Holm)", "Seed SD", "Seed noise"]
    assert [row[:4] for row in body] == [
        ["refcoco", "val", "mIoU", "Lo¦RA"],
        ["", "", "", "bridger"],
        ["", "", "", "coop"],
        ["", "testA", "mIoU", "Lo¦RA"],
        ["", "", "", "bridger"],
        ["", "", "", "coop"],
        ["", "", "oIoU", "Lo¦RA"],
        ["", "", "", "bridger"],
        ["", "", "", "coop"],
        ["refcoco+", "testA", "mIoU", "Lo¦RA"],
        ["", "", "", "bridger"],
    ]
    lora, bridger, coop = body[:3]
    # All images agree that LoRA is 5 points better: the smallest p that there is, times the 11 comparisons.
    assert lora[4:8] == ["+5.00 ▲", "[+5.00, +5.00]", "0.0010", "0.0110"]
    assert lora[8:] == ["0.10 / 0.10", "0.23"]
    # So they do for Bridger, but its seeds differ by 10.
    assert bridger[4:8] == ["+5.00", *lora[5:8]] and bridger[8] == "10.10 / 0.10" and float(bridger[9]) > 20
    assert coop[4:8] == ["+0.00", "[+0.00, +0.00]", "1.0000", "1.0000"]
    assert "Holm: over the 11 comparisons of this table." in out
    assert "- Scores on val, where the checkpoints were selected, are optimistic.\n" in out
    assert "Fix Backbone: refcoco / full, refcoco+ / coop, refcoco+ / full.\n" in out
    assert "Nothing can be marked" not in out


def test_its_numbers(bench):
    arguments = ("--against", "Fix Backbone", "--split", "testA", "--metric", "pr@0.6", "miou", "--json")
    code, out, err = bench(*arguments, "--resamples", "400", "--seed", "3")
    assert (code, err) == (0, "")
    records = json.loads(out)
    assert len(records) == 2 * (3 + 2)
    [record] = [r for r in records if (r["axes"]["method"], r["metric"]) == ("lora", "pr@0.6") and r["images"] == 60][
        :1
    ]
    assert record["axes"] == {"dataset": "refcoco", "method": "lora"} and record["against"] == "Fix Backbone"
    trials = [run.trial for run in load(Path("stand_in.yaml")).runs if run.axes["dataset"] == "refcoco"]
    for method, key in (("lora", "scores"), ("frozen", "scores_against")):
        expected = {
            str(trial.seed): evaluation.scores(predictions(trial, "testA")).precision_at["0.6"]
            for trial in trials
            if trial.method.name == method
        }
        assert record[key] == pytest.approx(expected)
    means = [np.mean(list(record[key].values())) for key in ("scores", "scores_against")]
    assert record["difference"] == pytest.approx(means[0] - means[1])
    assert record["interval"][0] < record["difference"] < record["interval"][1] and record["earned"] in (True, False)

    assert bench(*arguments, "--resamples", "400", "--seed", "3")[1] == out
    fewer = json.loads(
        bench("--against", "frozen", "--split", "testA", "--json", "--resamples", "400", "--seed", "3")[1]
    )
    shared = [{k: v for k, v in r.items() if k not in ("p_holm", "earned")} for r in records if r["metric"] == "miou"]
    assert [
        {k: v for k, v in r.items() if k not in ("p_holm", "earned")} for r in fewer if r["metric"] == "miou"
    ] == shared


def test_few_resamples_earn_nothing_and_that_is_said(bench):
    code, out, err = bench("--against", "frozen", "--resamples", "100")
    assert code == 0 and "+5.00" in out and "5.00 ▲" not in out
    assert (
        "- Nothing can be marked: of 11 comparisons with 100 resamples no p (Holm) is below 0.22; --resamples 440"
        in out
    )


def test_bad_files_are_named_and_left_out(bench, tmp_path, recwarn):
    foreign, _, gone = (folder(tmp_path, "lora", seed) / "expressions.parquet" for seed in (0, 1, 2))
    foreign.write_bytes((folder(tmp_path, "frozen", 0) / "expressions.parquet").read_bytes())
    bridger = folder(tmp_path, "bridger", 0) / "expressions.parquet"
    bridger.write_bytes(bridger.read_bytes()[:1000])
    gone.unlink()
    code, out, err = bench("--against", "frozen", "--split", "testA", "--metric", "miou", "--resamples", "1000")
    assert code == 0
    told = [str(warning.message).split(" is left out ") for warning in recwarn]
    assert [path for path, _ in told] == [str(foreign), str(gone), str(bridger)]
    assert [why.split(":")[0] for _, why in told] == ["(ValueError", "(FileNotFoundError", "(ArrowInvalid"]
    assert told[0][1] == "(ValueError: the scores of testA are not those of result.json)"
    lora, bridger, coop, *_ = rows(out)[1:]
    # One seed is left of LoRA, the second, and of Bridger the last two, which are 0.05 better in every method.
    assert lora[4] == "+5.00 ∗" and lora[8:] == ["– / 0.10", "–"]
    assert bridger[4] == "+10.05 ∗" and coop[4] == "+0.00"
    assert "- ∗ Some of the seeds have no result.\n" in out


def test_a_checkpoint_that_was_selected_on_a_test_split_is_marked(bench, tmp_path):
    text = TEXT.replace("select_on: val", "select_on: testA").replace("[refcoco, refcoco+]", "[refcoco]")
    Path("stand_in.yaml").write_text("".join(line for line in text.splitlines(True) if "RefCOCO+" not in line))
    for run in load(Path("stand_in.yaml")).runs:
        keep(Store(tmp_path / "results"), run.trial, {split: predictions(run.trial, split) for split in run.splits})
    code, out, err = bench("--against", "frozen", "--resamples", "1000")
    assert (code, err) == (0, "") and "+5.00 ▲ ‡" in out and "- ‡ The checkpoint was selected on a test split." in out


def test_a_report_marks_what_is_earned_in_its_table(bench, capsys):
    code, compared, _ = bench("--against", "frozen")
    assert cli.main(["report", "stand_in.yaml", "--against", "Fix Backbone", "--format", "md,tex"]) == 0
    table = capsys.readouterr().out
    assert Path("results/stand_in/comparison.md").read_text() == compared
    by_label = {row[0]: row[2:] for row in rows(table)}
    assert all("▲" in cell for cell in by_label["Lo¦RA"]) and not any("▲" in cell for cell in by_label["Fix Backbone"])
    assert not any("▲" in cell or "▼" in cell for cell in by_label["bridger"])
    assert "- ▲ better, ▼ worse than Fix Backbone, beyond what other images" in table
    assert r"$^\uparrow$" in Path("results/stand_in/table.tex").read_text()


def other_ground_truth(experiment: Experiment, tmp_path: Path) -> None:
    [run] = (
        r for r in experiment.runs if (r.axes["method"], r.axes["dataset"], r.axes["seed"]) == ("full", "refcoco", "1")
    )
    frames = {split: predictions(run.trial, split).assign(target=1) for split in run.splits}
    keep(Store(tmp_path / "results"), run.trial, frames)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--against", "adapter"],
            "'adapter' is no row of stand_in.yaml; compare against one of frozen, lora, bridger",
        ),
        (["--against", "full"], "nothing in stand_in.yaml can be compared with full"),
        (["--against", "frozen", "--split", "train"], "reports train; these splits are reported: val, testA, testB"),
        (["--against", "frozen", "--results", "elsewhere"], "elsewhere"),
    ],
)
def test_bad_input_exits_2_with_one_line(bench, arguments, message):
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_other_expressions_exit_2(bench, tmp_path):
    other_ground_truth(load(Path("stand_in.yaml")), tmp_path)
    code, out, err = bench("--against", "frozen")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: val of refcoco.tiny-clip-vit.frozen.s0.") and "ground-truth pixels" in err


@pytest.mark.parametrize("flags", [["--metric", "giou"], ["--resamples", "0"], ["--seed", "-1"], []])
def test_bad_flags_exit_2(bench, flags):
    with pytest.raises(SystemExit) as caught:
        bench(*(["--against", "frozen", *flags] if flags else []))
    assert caught.value.code == 2
