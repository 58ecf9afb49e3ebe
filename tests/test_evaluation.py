"""Evaluation of models whose answers are known: they read brightness, and referents are white on black."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F

from ris_bench import evaluation
from ris_bench.data.samples import Other, Sample
from ris_bench.loading import Tokenizer
from ris_bench.transforms import CLIP_MEAN, CLIP_STD, Letterbox, restore

SIZE = 64
SETTINGS = {"tokenizer": Tokenizer(17), "threshold": 0.35, "batch_size": 4, "device": torch.device("cpu")}


class Bright(nn.Module):
    """Finds white where it is asked for "white", and everything but white otherwise; NaN for the word "nothing"."""

    def __init__(self):
        super().__init__()
        self.backbone = SimpleNamespace(image_size=SIZE)
        self.frozen, self.tuned = nn.BatchNorm2d(3), nn.Dropout(0.9)
        self.word_to_id = {word: SETTINGS["tokenizer"]([word])[0, 1].item() for word in ("white", "nothing")}

    def known(self, image_U3HW):
        return image_U3HW

    def forward(self, image_B3HW, tokens_BL):
        assert not torch.is_grad_enabled()
        mean_3, std_3 = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
        image_B3HW = self.tuned(image_B3HW) * std_3.view(3, 1, 1) + mean_3.view(3, 1, 1)
        logits_B1hw = 20 * (F.avg_pool2d(image_B3HW.mean(1, keepdim=True), 4) - 0.5)
        first_B = tokens_BL[:, 1]
        logits_B1hw[first_B != self.word_to_id["white"]] *= -1
        logits_B1hw[first_B == self.word_to_id["nothing"], :, 3, 3] = torch.nan
        return logits_B1hw


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Nine expressions of five referents in images of three shapes, one of them much smaller than the input."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for ref_id, (width, height) in enumerate([(320, 240), (240, 320), (320, 240), (24, 24), (320, 240)]):
        box = (width // (4 + ref_id), height // 3, width - width // 4, height - height // 5)
        image = Image.new("RGB", (width, height), "black")
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), "white")
        image.save(path := folder / f"{ref_id}.png")
        polygon = [box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]
        for sentence_index in range(1 + ref_id % 2 + ref_id // 3):
            found.append(
                Sample(
                    dataset="boxes",
                    split="testA",
                    ref_id=ref_id,
                    sent_id=100 + len(found),
                    sentence_index=sentence_index,
                    image_id=ref_id,
                    ann_id=10 * ref_id,
                    category="box",
                    expression="white",
                    raw="White!",
                    image_path=path,
                    height=height,
                    width=width,
                    segmentation=[polygon],
                )
            )
    assert len(found) == 9
    return found


def reworded(samples, expression):
    return [replace(sample, expression=expression) for sample in samples]


def test_the_ground_truth_scores_one_and_the_background_nothing(samples):
    frame = evaluation.evaluate(Bright(), samples, **SETTINGS)
    assert (frame["intersection"] / frame["union"]).min() > 0.85
    assert evaluation.scores(frame).miou > 0.95
    frame = evaluation.evaluate(Bright(), reworded(samples, "black"), **SETTINGS)
    assert evaluation.scores(frame).oiou < 0.05


def the_long_way(map_HW, frame):
    """Over the square -> in the frame of the image, as one would write it for a single map."""
    content_HW = map_HW[frame.content][None, None]
    return F.interpolate(content_HW, (frame.height, frame.width), mode="bilinear", align_corners=False)[0, 0]


def test_counts_are_those_of_two_interpolations_in_the_original_frame(samples):
    """The long way, one by one: up to the input, crop, up to the image, sigmoid, compare."""
    found = evaluation.evaluate(Bright(), samples, **SETTINGS)
    for sample, row in zip(samples, found.itertuples(), strict=True):
        image_HW3 = torch.from_numpy(Letterbox(SIZE).image(sample.image())).double() / 255
        logits_HW = 20 * (F.avg_pool2d(image_HW3.mean(2)[None, None], 4) - 0.5)
        logits_HW = F.interpolate(logits_HW, (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
        frame = Letterbox(SIZE).frame(sample.height, sample.width)
        predicted_HW = the_long_way(logits_HW, frame).sigmoid().numpy() > SETTINGS["threshold"]
        target_HW = sample.mask() == 1
        assert row.intersection == np.sum(predicted_HW & target_HW)
        assert row.union == np.sum(predicted_HW | target_HW)
        assert (row.predicted, row.target) == (np.sum(predicted_HW), np.sum(target_HW))


@pytest.mark.parametrize("height, width", [(480, 640), (333, 500), (500, 17), (40, 40), (1, 9)])
@pytest.mark.parametrize("stride", [4, 8])
def test_restoration_is_two_interpolations(height, width, stride):
    frame = Letterbox(96).frame(height, width)
    map_BHW = torch.randn(
        2, 96 // stride, 96 // stride, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    whole_B1HW = F.interpolate(map_BHW[:, None], (96, 96), mode="bilinear", align_corners=False)
    expected_BHW = torch.stack([the_long_way(whole_HW, frame) for whole_HW in whole_B1HW[:, 0]])
    torch.testing.assert_close(restore(map_BHW, frame), expected_BHW, rtol=0, atol=1e-12)


def test_other_thresholds_are_counted_as_if_each_were_the_one(samples):
    swept = evaluation.evaluate(Bright(), samples, **SETTINGS, others=evaluation.THRESHOLDS)
    assert swept[[column for column in swept if "@" not in column]].equals(
        evaluation.evaluate(Bright(), samples, **SETTINGS)
    )
    scores = evaluation.scores(swept)
    assert list(scores.by_threshold) == [f"{k / 100:g}" for k in range(5, 100, 5)]
    for one in (0.05, 0.35, 0.5, 0.95):
        alone = evaluation.evaluate(Bright(), samples, **{**SETTINGS, "threshold": one})
        for column in ("intersection", "union"):
            assert swept[f"{column}@{one:g}"].tolist() == alone[column].tolist()
        expected = evaluation.scores(alone)
        assert scores.by_threshold[f"{one:g}"] == {"oiou": expected.oiou, "miou": expected.miou}
    assert len({str(found) for found in scores.by_threshold.values()}) > 5


def test_a_row_says_which_expression_it_is_and_counts_in_int64(samples):
    frame = evaluation.evaluate(Bright(), samples, **SETTINGS)
    identity = ["dataset", "split", "ref_id", "sent_id", "sentence_index", "image_id", "ann_id", "category"]
    counts = ["intersection", "union", "predicted", "target"]
    assert list(frame) == [*identity, "expression", *counts]
    assert {str(dtype) for dtype in frame[counts].dtypes} == {"int64"}
    assert frame["sent_id"].tolist() == [sample.sent_id for sample in samples]
    assert (frame["union"] == frame["predicted"] + frame["target"] - frame["intersection"]).all()
    assert frame["target"].tolist() == [int(sample.mask().sum()) for sample in samples]


def test_neither_batches_nor_order_change_a_count(samples):
    frame = evaluation.evaluate(Bright(), samples, **SETTINGS)
    for batch_size in (1, 2, 100):
        pd.testing.assert_frame_equal(
            evaluation.evaluate(Bright(), samples, **{**SETTINGS, "batch_size": batch_size}), frame
        )
    # Backwards, shapes and referents meet in other batches.
    backwards = evaluation.evaluate(Bright(), samples[::-1], **SETTINGS)
    pd.testing.assert_frame_equal(backwards[::-1].reset_index(drop=True), frame)


def test_a_probability_equal_to_the_threshold_is_background(samples):
    class Undecided(Bright):
        def forward(self, image_B3HW, tokens_BL):
            return torch.zeros(len(image_B3HW), 1, SIZE // 4, SIZE // 4)

    assert evaluation.evaluate(Undecided(), samples, **{**SETTINGS, "threshold": 0.5})["predicted"].sum() == 0
    frame = evaluation.evaluate(Undecided(), samples, **{**SETTINGS, "threshold": 0.49})
    assert frame["predicted"].tolist() == [sample.height * sample.width for sample in samples]


def test_the_model_computes_in_the_precision_asked_for_and_nothing_else_does(samples):
    class Rounded(Bright):
        def forward(self, image_B3HW, tokens_BL):
            logits_B1hw = super().forward(image_B3HW, tokens_BL)
            found = logits_B1hw @ torch.eye(SIZE // 4)
            dtypes.add(found.dtype)
            return found

    dtypes = set()
    half = evaluation.evaluate(Rounded(), samples, **SETTINGS, autocast=torch.bfloat16)
    assert dtypes == {torch.bfloat16}
    whole = evaluation.evaluate(Bright(), samples, **SETTINGS)
    # The logits are right to 1/256; interpolated in bfloat16 they would put borders elsewhere.
    assert (half["predicted"] / whole["predicted"] - 1).abs().max() < 2e-3


def test_what_is_beside_the_referent_is_recorded_where_the_dataset_knows(samples):
    """Asked for everything but white, the model finds the image less the box: 0.6 of it lie under `wide`."""

    def polygon(left, top, right, bottom):
        return [[left, top, right, top, right, bottom, left, bottom]]

    sample = replace(samples[0], expression="black", category="box+cup")
    width, height = sample.width, sample.height
    wide, corner = polygon(0, 0, width, height // 4), polygon(0, 0, 8, 8)
    others = [Other(1, "box", corner), Other(2, "cup", wide), Other(3, "plate", [[0.0]]), Other(4, "box", None)]
    known = [replace(sample, others=others), replace(sample, others=[], ref_id=7), replace(sample, ref_id=8)]
    frame = evaluation.evaluate(Bright(), [*known, replace(known[0], ref_id=9, category="")], **SETTINGS)
    assert list(frame)[-3:] == list(evaluation.BESIDE)
    area = width * (height // 4)
    first = frame.iloc[0]
    assert first["distractors"] == 3
    assert first["other_intersection"] == pytest.approx(area, rel=0.01)
    assert first["other_union"] == first["predicted"] + area - first["other_intersection"]
    assert frame.loc[1, list(evaluation.BESIDE)].tolist() == [0, 0, 0]
    assert frame.loc[2, list(evaluation.BESIDE)].isna().all()
    assert frame["distractors"].isna().tolist() == [False, False, True, True]
    # What is beside an object changes no count, and where no sample knows there is no column.
    plain = evaluation.evaluate(Bright(), [sample], **SETTINGS)
    assert list(plain)[-1] == "target"
    assert (plain.iloc[0][list(evaluation.COUNTS)] == first[list(evaluation.COUNTS)]).all()


def test_progress_is_reported_up_to_the_last_expression(samples):
    reports = []
    evaluation.evaluate(Bright(), samples, **SETTINGS, report=lambda done, total: reports.append((done, total)))
    assert reports == sorted(reports) and len(reports) > 1 and reports[-1] == (9, 9)


def test_every_module_keeps_its_mode(samples):
    model = Bright().train()
    model.frozen.eval()
    evaluation.evaluate(model, samples, **SETTINGS)
    assert (model.training, model.frozen.training, model.tuned.training) == (True, False, True)
    with pytest.raises(FloatingPointError):
        evaluation.evaluate(model, reworded(samples, "nothing"), **SETTINGS)
    assert (model.training, model.frozen.training, model.tuned.training) == (True, False, True)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_logit_that_is_no_number_names_the_expression(samples):
    bad = samples[:6] + reworded(samples[6:7], "nothing at all") + samples[7:]
    with pytest.raises(FloatingPointError, match="'nothing at all', sentence 2 of referent 3 in boxes testA"):
        evaluation.evaluate(Bright(), bad, **SETTINGS)


def test_tables_of_all_splits_come_back_from_one_file(samples, tmp_path):
    frame = evaluation.evaluate(Bright(), samples, **SETTINGS)
    path = tmp_path / "expressions.parquet"
    evaluation.write({"testA": frame, "testA/shuffled": frame[:4]}, path)
    found = pd.read_parquet(path)
    assert found["split"].tolist() == ["testA"] * 9 + ["testA/shuffled"] * 4
    pd.testing.assert_frame_equal(found[:9], frame)
    assert evaluation.scores(found[found["split"] == "testA"]) == evaluation.scores(frame)


def test_a_table_is_written_whole_or_not_at_all(samples, tmp_path):
    frame = evaluation.evaluate(Bright(), samples, **SETTINGS)
    path = tmp_path / "expressions.parquet"
    evaluation.write({"testA": frame}, path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="object"):
        evaluation.write({"testA": frame.assign(expression=object())}, path)
    assert path.read_bytes() == before
    (folder := tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        evaluation.write({"testA": frame}, folder)
    assert {path, folder} == set(tmp_path.iterdir())


def test_overlays_show_prediction_and_ground_truth(samples, tmp_path):
    folder = tmp_path / "overlays"
    evaluation.overlays(Bright(), samples, folder, **SETTINGS, limit=3)
    assert {path.name for path in folder.iterdir()} == {"0-0.png", "3-0.png", "4-1.png"}  # The first, middle and last.
    pictures = {path.name: np.asarray(Image.open(path)) for path in folder.iterdir()}
    assert all(picture.shape[1] >= 400 for picture in pictures.values())
    photo_HW3 = pictures["0-0.png"][:480]
    assert {(230, 159, 0), (0, 114, 178)} <= set(map(tuple, photo_HW3.reshape(-1, 3).tolist()))
    assert photo_HW3[240, 320] == pytest.approx([153, 199, 224], abs=1)  # White, tinted.
    # Where there are fewer samples than the limit each is shown, and a picture is a function of its sample.
    evaluation.overlays(Bright(), samples, folder, **SETTINGS)
    assert len(list(folder.iterdir())) == 9
    assert all((np.asarray(Image.open(folder / name)) == picture).all() for name, picture in pictures.items())


def test_a_long_expression_stays_inside_its_picture(samples, tmp_path):
    long = reworded(samples[:1], "white " + "word " * 100 + "w" * 300)
    evaluation.overlays(Bright(), long, tmp_path, **SETTINGS)
    picture = np.asarray(Image.open(tmp_path / "0-0.png").convert("L"))
    assert picture.shape[0] < 2 * 240 + 200
    assert (picture[2 * 240 + 4 :, -4:] == 255).all()
