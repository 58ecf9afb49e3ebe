"""Groups of expressions, their scores worked out by hand, and tables whose texts are hostile."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest

from ris_bench import cli, sweep
from ris_bench.errors import UserError
from ris_bench.records import Choice, Evaluation, Result, Training, Trial
from ris_bench.report import breakdowns
from ris_bench.report.breakdowns import BY, WORDS, breakdown, kinds
from ris_bench.results import Store


def table(*rows: dict) -> pd.DataFrame:
    """A row has a target of 100 pixels and is predicted perfectly, but for what it says."""
    perfect = {
        **{"split": "val", "category": "cup", "expression": "the cup", "sentence_index": 0},
        **{"intersection": 100, "union": 100, "predicted": 100, "target": 100},
        **{"distractors": 0, "other_intersection": 0, "other_union": 0},
    }
    frame = pd.DataFrame([perfect | row for row in rows])
    recorded = ["distractors", "other_intersection", "other_union"]
    return frame.astype(dict.fromkeys(recorded, "Int64"))


RIGHT = {}
HALF = {"intersection": 50, "union": 100, "predicted": 50, "other_intersection": 0, "other_union": 90}
WRONG = {"intersection": 10, "union": 190, "predicted": 100, "other_intersection": 80, "other_union": 120}
TIE = {"intersection": 25, "union": 175, "predicted": 100, "other_intersection": 50, "other_union": 350}
MISSED = {"intersection": 0, "union": 300, "predicted": 200, "other_intersection": 0, "other_union": 0}
NOTHING = {"intersection": 0, "union": 100, "predicted": 0, "other_intersection": 0, "other_union": 40}


def groups(frame: pd.DataFrame, by: str) -> dict[str, int]:
    """The number of expressions in each group, in the order shown."""
    return {group.group: group.num_expressions for group in breakdown("t", frame, by)}


def test_scores_and_rates_of_a_group_by_hand():
    (group,) = breakdown("t", table(RIGHT, HALF, WRONG, TIE, MISSED, NOTHING), "all")
    assert (group.trial, group.split, group.by, group.group, group.num_expressions) == ("t", "val", "all", "all", 6)
    assert group.miou == pytest.approx((1 + 1 / 2 + 1 / 19 + 1 / 7 + 0 + 0) / 6)
    assert group.oiou == pytest.approx((100 + 50 + 10 + 25) / (100 + 100 + 190 + 175 + 300 + 100))
    assert group.precision == pytest.approx(1 / 6)  # 0.5 is not greater than 0.5
    assert group.zero_iou == pytest.approx(2 / 6)
    assert group.empty == pytest.approx(1 / 6)
    assert group.wrong_instance == pytest.approx(1 / 6)  # as much of another as of its own is not wrong


def test_expressions_without_target_are_in_the_scores_and_not_in_the_rates():
    nothing = {"intersection": 0, "union": 0, "predicted": 0, "target": 0}
    frame = table(RIGHT, nothing, nothing | {"union": 9, "predicted": 9})
    (group,) = breakdown("t", frame, "all")
    assert group.miou == pytest.approx(1 / 3)
    assert (group.zero_iou, group.empty, group.wrong_instance) == (0, 0, 0)
    named = {group.group: group for group in breakdown("t", frame, "people")}
    assert list(named) == ["things", "no target"]
    assert named["no target"].num_expressions == 2 and named["no target"].zero_iou is None
    assert "–" in breakdowns.markdown([named["no target"]])


def test_splits_are_apart_and_in_the_order_of_the_table():
    frame = table({"split": "testB"}, {"split": "testA"}, {"split": "testA/shuffled"}, {"split": "testA"})
    found = [(group.split, group.num_expressions) for group in breakdown("t", frame, "all")]
    assert found == [("testB", 1), ("testA", 2), ("testA/shuffled", 1)]


def test_groups_and_their_order():
    area = [{"target": n, "predicted": n, "intersection": n, "union": n} for n in (0, 1, 1023, 1024, 9215, 9216)]
    assert groups(table(*area), "area") == {"no target": 1, "small": 2, "medium": 2, "large": 1}
    categories = [{"category": name} for name in ("person", "cup", "person+cup", "", "persons")]
    assert groups(table(*categories), "category") == dict.fromkeys(
        ("cup", "no category", "person", "person+cup", "persons"), 1
    )
    assert groups(table(*categories), "people") == {"people": 2, "things": 3}
    distractors = [{"distractors": n} for n in (7, 5, 4, 0, None)]
    assert groups(table(*distractors), "distractors") == {"0": 1, "4": 1, "5 or more": 2, "not recorded": 1}
    ranks = [{"sentence_index": n} for n in (2, 0, 1, 9)]
    assert groups(table(*ranks), "rank") == {"1": 1, "2": 1, "3 or more": 2}
    lengths = [{"expression": "w " * n} for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 20, 21, 10_000)]
    assert groups(table(*lengths), "length") == {
        **{"0": 1, "1 to 2": 2, "3": 1, "4 to 5": 2, "6 to 7": 2, "8 to 10": 2, "11 to 20": 2, "21 or more": 2}
    }
    words = [{"expression": "left cup"}, {"expression": "red cup"}]
    assert groups(table(*words), "location") == {"with location words": 1, "without": 1}


@pytest.mark.parametrize(
    "expression, category, expected",
    [
        ("man on the LEFT, in red", "person", {"location", "colour"}),
        ("2nd from right", "person", {"ordinal", "location"}),
        ("the cup in front of the plate", "cup", {"relation"}),
        ("front cup", "cup", {"location"}),
        ("on top of the box", "cup", {"relation"}),
        ("the orange", "orange", set()),
        ("orange cup", "cup", {"colour"}),
        ("bright lefty reddish seconds", "cup", set()),
        ("blanket under\tthe cat", "bed", {"relation"}),
        ("", "", set()),
        ("الرجل 😀", "cup", set()),
    ],
)
def test_words_are_told(expression, category, expected):
    assert kinds(expression, category) == expected


def test_a_word_is_of_one_kind_and_can_be_found():
    phrases = [phrase for kind in WORDS.values() for phrase in kind]
    assert len(set(phrases)) == len(phrases)
    for kind, own in WORDS.items():
        assert all(kinds(f"the thing {phrase} it") == {kind} for phrase in own)


def test_what_was_not_recorded_is_said():
    frame = table(RIGHT, WRONG).drop(columns=["distractors", "other_intersection", "other_union"])
    (group,) = breakdown("t", frame, "distractors")
    assert (group.group, group.wrong_instance) == ("not recorded", None)
    assert breakdowns.markdown([group]).splitlines()[2].count("not recorded") == 2
    # Of some only, as in a mix of data sets, the rate is of those.
    (group,) = breakdown("t", table(WRONG, {"other_intersection": None, "other_union": None}), "all")
    assert group.wrong_instance == 1


def test_hostile_names_stay_in_their_cells():
    names = [
        "a|b",
        "<script>",
        "[x](javascript:y)",
        "`c`",
        "line\nbreak",
        "\x1b[31mred",
        "\u202egnp",
        "x" * 10_000,
        "*",
    ]
    frame = table(*({"category": name, "expression": name, "split": name} for name in names))
    text = breakdowns.markdown([group for by in BY for group in breakdown("t|t", frame, by)])
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == len(BY) * (2 + len(names))
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {10}
    assert max(map(len, lines)) < 600
    for bad in ("<script", "\x1b", "\u202e", "](", " `c`"):
        assert not re.search(rf"(?<!\\){re.escape(bad)}", text.replace("\\[x](", ""))


# The command


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


def trial(store: Store, frame: pd.DataFrame | None, seed: int = 0, status: str = "done") -> str:
    """The id of a trial that left this table."""
    head = Choice(name="etris")
    one = Trial(
        dataset=Choice(name="refcoco"),
        backbone=Choice(name="tiny-clip-vit"),
        method=Choice(name="frozen"),
        head=head,
        train=Training(epochs=1, batch_size=2, lr=1e-3, milestones=(), gamma=0.1, precision="fp32"),
        eval=Evaluation(select_on="val"),
        seed=seed,
    )
    folder = store.begin(one)
    if frame is not None:
        frame.to_parquet(folder / "expressions.parquet", index=False)
    record = json.loads(sweep.failure(one, "the loss is nan").to_json()) | {"status": status}
    store.finish(folder, Result.from_json(json.dumps(record)))
    return one.id


def test_the_command(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    frame = table(RIGHT, WRONG | {"split": "testA"})
    first, second = trial(store, frame), trial(store, frame, seed=1)
    assert cli.main(["breakdown", first, "--by", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert header[2:] == ["Expressions", "mIoU", "oIoU", "Pr@0.5", "Zero IoU", "Empty", "Wrong instance"]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["val", "all", "1", *["100.00"] * 3, *["0.00"] * 3]
    assert "protocol ris-bench" in lines[-4]

    both = ["breakdown", first, str(store.folder(Result.from_json(read(store, second)).trial)), "--split", "testA"]
    assert cli.main([*both, "--by", "rank", "--by", "area"]) == 0
    out = capsys.readouterr().out
    assert out.count(first) == out.count(second) == 2 and " val " not in out
    assert cli.main([*both, "--by", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(group["trial"], group["split"]) for group in found] == [(first, "testA"), (second, "testA")]
    assert found[0]["wrong_instance"] == 1 and found[0]["miou"] == pytest.approx(1 / 19)


def read(store: Store, name: str) -> str:
    return (store.root / "trials" / name / "result.json").read_text()


def test_tables_that_are_none_end_in_one_line(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = table(RIGHT)
    for seed, (frame, message) in enumerate(
        (
            (None, "expressions.parquet cannot be read"),
            (good.drop(columns=["target", "category"]), "lacks the columns category, target"),
            (good[:0], "holds no counts of expressions"),
            (good.assign(intersection=1000), "holds no counts of expressions"),
            (good.assign(predicted="many"), "holds no counts of expressions"),
            (good.assign(category=[None]), "holds no counts of expressions"),
        )
    ):
        assert cli.main(["breakdown", trial(store, frame, seed)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and re.search(message, err), err
    broken = trial(store, good, seed=10)
    (store.root / "trials" / broken / "expressions.parquet").write_bytes(b"PAR1" + bytes(100))
    for arguments, message in (
        ([broken], "cannot be read"),
        ([trial(store, good, seed=11), "--split", "testC"], "was not evaluated on testC; its splits are val"),
        ([trial(store, good, seed=12, status="failed")], "failed .the loss is nan"),
        (["nothing"], "0 trials"),
    ):
        assert cli.main(["breakdown", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and re.search(message, err), err


def test_a_table_of_a_thousand_categories_is_quick():
    rng = np.random.default_rng(0)
    frame = table(*({"category": f"c{rng.integers(1000)}"} for _ in range(5000)))
    assert sum(groups(frame, "category").values()) == 5000


def test_a_file_that_is_no_table_is_no_user_error_of_pandas(tmp_path):
    (tmp_path / "expressions.parquet").write_text("text")
    with pytest.raises(UserError, match="cannot be read"):
        breakdowns.read(tmp_path)
