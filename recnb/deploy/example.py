"""Print an image's embedding with onnxruntime, numpy and pillow alone.

python example.py IMAGE [MODEL.onnx]
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MOST = int(os.environ.get("RECNB_MAX_PIXELS", "64_000_000"))  # pixels of an image: more is not decoded


def prepare(image, steps):
    """Return a Pillow image as uint8 (H, W, 3): upright, in RGB, resized and cropped as in the evaluation.

    Raises ValueError for one that has too many pixels, or pixels that RGB cannot hold.
    """
    if image.width * image.height > MOST:
        raise ValueError(f"the image has {image.width:,} x {image.height:,} pixels, and {MOST:,} are allowed")
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    clear = image.info.get("transparency")
    image = ImageOps.exif_transpose(image)
    if wide:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow itself would clip it to white
    if image.mode in ("I", "F") or (isinstance(clear, int | tuple) and (wide or np.max(clear) > 255)):
        raise ValueError(f"8 bits of RGB cannot hold these pixels of kind {image.mode}; save the image as RGB or grey")
    if image.has_transparency_data:  # what is clear becomes white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    for step in steps:
        now = image.size[::-1]
        if "crop" in step:
            top, left = (round(gap / 2) if gap > 0 else int(gap / 2) for gap in np.subtract(now, step["crop"]))
            image = image.crop((left, top, left + step["crop"][1], top + step["crop"][0]))  # black beyond the border
        else:
            height, width = step.get("resize") or [int(step["resize_short"] * side / min(now)) for side in now]
            image = image.resize((width, height), Image.Resampling[step["interpolation"].upper()])
    return np.asarray(image)


class Model:
    """Model('model.onnx')(image) is the embedding (D,) of a Pillow image; `meta` is what inference.yml says.

    Raises ValueError for a file that SHA256SUMS beside it does not know.
    """

    def __init__(self, path):
        sums = Path(path).with_name("SHA256SUMS")
        if sums.is_file() and hashlib.sha256(Path(path).read_bytes()).hexdigest() not in sums.read_text():
            raise ValueError(f"{path}: is damaged, SHA256SUMS beside it says so; take a whole copy")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.meta = json.loads(self.session.get_modelmeta().custom_metadata_map["inference"])

    def __call__(self, image):
        return self.session.run(None, {"image": prepare(image, self.meta["preprocess"])[None]})[0][0]


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    picture, path = [*sys.argv[1:], str(Path(__file__).with_name("model.onnx"))][:2]
    try:
        print(*Model(path)(Image.open(picture)).tolist())
    except Exception as error:  # decoders and the runtime raise whatever a broken file leads them to
        sys.exit(f"no embedding of {picture} by {path}: {str(error).splitlines()[0] if str(error) else type(error)}")
