"""You receive an ONNX file that `ensemble export` wrote, and have neither torch nor this package.

    python examples/consume.py final.onnx recording.npy

Needs onnxruntime and NumPy only. The recording holds raw features, (frames, features) float32. All else stands in the
file's metadata: what the input is, and the names of the classes.
"""

import json
import sys
from itertools import groupby

import numpy as np
import onnxruntime


def windows(features: np.ndarray, wanted: dict[str, object]) -> np.ndarray:
    """(T, columns): the context window of every frame, for a file that was exported without windows.

    Each feature is shifted to mean zero and scaled to variance one over the recording; zeros stand beyond its ends.
    """
    if wanted["normalisation"] != "mean_std":
        raise SystemExit(f"this example normalises by mean_std, the file wants {wanted['normalisation']}")
    mean, deviation = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 1e-7 * np.abs(mean))
    rows = ((features - mean) * scale).astype(np.float32)
    context = int(str(wanted["context"]))
    padded = np.pad(rows, ((context, context), (0, 0)))
    around = np.arange(len(rows))[:, None] + np.arange(2 * context + 1)
    found: np.ndarray = padded[around].reshape(len(rows), -1)
    return found


def main() -> None:
    """Print the class sequence of a recording, and how sure the ensemble is on the average frame."""
    file, recording = sys.argv[1:]
    session = onnxruntime.InferenceSession(file)
    known = session.get_modelmeta().custom_metadata_map
    classes, wanted = json.loads(known["classes"]), json.loads(known["input"])
    x = np.load(recording, allow_pickle=False).astype(np.float32)
    if wanted["kind"] == "windows":
        x = windows(x, wanted)
    probabilities, best = session.run(["probabilities", "class"], {wanted["kind"]: x})
    print(*(classes[index] for index, _ in groupby(best)))
    print(f"{len(best)} frames, mean confidence {probabilities.max(axis=1).mean():.4f}")


if __name__ == "__main__":
    main()
