"""ris-bench predict."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ris_bench.cli.arguments import CHECKPOINT, add_model, load_model

PREDICT = """\
Finds what a sentence refers to: in one photo; in every image of a folder; or pair by pair in a CSV file with the
columns image and expression, whose paths start from its folder.

mask         PNG, 0 and 255, of the photo's size
overlay      the photo with the mask tinted and outlined, and the expression below (at most 1600 pixels a side)
probability  a 16-bit greyscale PNG, 65535 is 1; or, named .npy, float32

Of one photo that is written which has a name; STEM.mask.png, STEM.overlay.png and STEM.probability.png in the working
directory if nothing has. Of several photos all is written to --out DIR, a new folder, with an index.csv. A photo is
turned upright as its EXIF orientation says, and its mask with it.
"""


def add(verbs: Any) -> None:
    predict = verbs.add_parser(
        "predict",
        help="segment what an expression refers to, in photos of your own",
        description=PREDICT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.set_defaults(call=lambda args: _call(args, predict))
    predict.add_argument("image", type=Path, metavar="IMAGE", help="a photo, a folder of photos, or a .csv of pairs")
    predict.add_argument("expression", nargs="?", metavar="EXPRESSION", help="such as 'the man on the left'")
    predict.add_argument("--checkpoint", required=True, **CHECKPOINT)
    add_model(predict)
    predict.add_argument("--out", type=Path, metavar="MASK.png|DIR", help="the mask, or with several photos the folder")
    predict.add_argument("--overlay", type=Path, metavar="FILE", help="the overlay of one photo")
    predict.add_argument("--probability", type=Path, metavar="FILE", help="the probability of one photo")


def _call(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    pairs = args.image.suffix.lower() == ".csv"
    several = pairs or args.image.is_dir()
    if pairs != (args.expression is None):
        parser.error("an expression goes with an image or a folder of images; the pairs of a CSV have theirs")
    if args.expression is not None and not args.expression.strip():
        parser.error("the expression is empty")
    if several and (args.out is None or args.overlay or args.probability):
        parser.error("of several photos everything goes to --out DIR")

    from ris_bench import predict  # only now: it imports torch

    if several:
        found = predict.pairs(args.image, args.expression)
        predict.check_folder(args.out)
        for path in predict.predict_all(load_model(args, args.checkpoint), found, args.out):
            print(path, flush=True)
        return 0
    names = {"mask": args.out, "overlay": args.overlay, "probability": args.probability}
    if not any(names.values()):
        names = {kind: Path(f"{args.image.stem}.{kind}.png") for kind in names}
    predict.check_names(args.image, **names)
    prediction = load_model(args, args.checkpoint)(args.image, args.expression)
    prediction.save(**names)
    share, highest = prediction.mask.mean(), prediction.probability.max()
    print(f"{share:.1%} of the photo; the highest probability is {highest:.3f}")
    for path in filter(None, names.values()):
        print(path)
    return 0
