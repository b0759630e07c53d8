"""Synthesise a small corpus of labelled speech with eSpeak NG, and pack it for `zoo`.

eSpeak NG speaks each sentence in a voice and says when every phoneme starts; gain, a channel, a room and noise make the
result hard enough to be worth learning. Voices and sentences of train, valid and test are disjoint. This is how the
project's bundled corpus was made, and an example of how to bring a corpus of one's own (`--folders`).

Needs eSpeak NG's shared library (Debian: apt-get install libespeak-ng1).

    python examples/synthesise.py corpus.npz             # the bundled corpus
    python examples/synthesise.py my-corpus --folders    # the same as folders for zoo.read_corpus
"""

import argparse
import ctypes
import wave
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import zoo
from zoo import _console
from zoo.data.audio import HOP, SAMPLE_RATE

Samples = NDArray[np.float64]

# Voice variants of eSpeak NG over its American English. Variants of one speaker stay in one partition.
VOICES = {
    "train": "m1 m2 m3 m4 m5 f1 f2 f3 Alex Alicia Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco "
    "Mario Michael anika antonio aunty belinda benjamin boris caleb david edward grandma iven john klatt klatt2 "
    "marcelo miguel steph",
    "valid": "m6 f4 Mike ed klatt3 linda pablo quincy robert travis",
    "test": "m7 f5 adam croak klatt4 max gustave paul pedro rob sandro victor",
}

# How hard it is.
SNR = (12.0, 35.0)  # decibels: speech over noise
WET = (0.05, 0.3)  # the room's tail over the direct sound
COLOUR = 4.0  # decibels: standard deviation of the channel's response

# eSpeak's mnemonics of American English -> ARPAbet; several phonemes share the time of one mnemonic evenly.
ARPABET = {
    "_": "[SIL]", "_:": "[SIL]", "_!": "[SIL]",
    "0": "AA", "A:": "AA", "A@": "AA R", "a": "AE", "aa": "AE", "V": "AH", "@": "AH", "@2": "AH", "a#": "AH",
    "@L": "AH L", "O:": "AO", "O2": "AO", "O@": "AO R", "o@": "AO R", "aU": "AW", "aI": "AY", "aI@": "AY AH",
    "aI3": "AY ER", "E": "EH", "e@": "EH R", "3": "ER", "3:": "ER", "eI": "EY", "I": "IH", "I#": "IH", "I2": "IH",
    "i@3": "IH R", "i": "IY", "i:": "IY", ";": "IY", "i@": "IY AH", "oU": "OW", "OI": "OY", "U": "UH", "U@": "UH R",
    "u:": "UW", "b": "B", "tS": "CH", "d": "D", "D": "DH", "f": "F", "g": "G", "h": "HH", "dZ": "JH", "k": "K",
    "l": "L", "m": "M", "n": "N", "n-": "N", "N": "NG", "p": "P", "r": "R", "r-": "R", "s": "S", "S": "SH", "t": "T",
    "t2": "T", "t#": "T", "?": "T", "T": "TH", "v": "V", "w": "W", "j": "Y", "z": "Z", "Z": "ZH",
}  # fmt: skip


@dataclass(frozen=True)
class Take:
    """One recording to be made: who says what, and the seed of everything that varies."""

    partition: str
    name: str
    voice: str
    sentence: str
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Recording:
    """A finished recording: 16-bit samples (S,), features (T, 27) and labels (T,)."""

    take: Take
    samples: NDArray[np.int16]
    features: NDArray[np.float32]
    labels: NDArray[np.uint8]


class _Identifier(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("phoneme", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    """`espeak_EVENT` of espeak-ng/speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Identifier),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Espeak:
    """eSpeak NG's C library: text in, samples and phoneme times out. One per process."""

    SYNCHRONOUS, PHONEME_EVENTS, PHONEME, RATE, PITCH, RANGE, UTF8 = 2, 1, 7, 1, 3, 4, 1

    def __init__(self) -> None:
        name = find_library("espeak-ng")
        if name is None:
            msg = "found no eSpeak NG library; install it, for example: apt-get install libespeak-ng1"
            raise SystemExit(msg)
        self._library = ctypes.CDLL(name)
        self.sample_rate = self._library.espeak_Initialize(self.SYNCHRONOUS, 0, None, self.PHONEME_EVENTS)
        self._callback = _Callback(self._receive)  # kept: ctypes does not hold it
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_Info.restype = ctypes.c_char_p
        folder = ctypes.c_char_p()
        self.version = self._library.espeak_Info(ctypes.byref(folder)).decode().split()[0]
        self._variants = Path((folder.value or b"").decode()) / "voices" / "!v"

    def say(
        self, sentence: str, voice: str, *, rate: int, pitch: int, spread: int
    ) -> tuple[Samples, list[tuple[float, str]]]:
        """Samples (S,) at `sample_rate`, and (seconds, mnemonic) of every phoneme's start.

        Args:
            rate: words a minute.
            pitch: 0 ... 100, 50 is the voice's own.
            spread: 0 ... 100, how far the pitch moves.
        """
        self._blocks: list[NDArray[np.int16]] = []
        self._phonemes: list[tuple[float, str]] = []
        known = (self._variants / voice).is_file()  # eSpeak NG would fall back on its plain voice without a word
        if not known or self._library.espeak_SetVoiceByName(f"en-us+{voice}".encode()) != 0:
            msg = f"eSpeak NG {self.version} has no American English with the variant {voice!r}"
            raise SystemExit(msg)
        for parameter, value in ((self.RATE, rate), (self.PITCH, pitch), (self.RANGE, spread)):
            self._library.espeak_SetParameter(parameter, value, 0)
        ctypes.CDLL(None).srand(1)  # its breath noise is libc's rand()
        text = sentence.encode()
        self._library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 1, 0, self.UTF8, None, None)
        # The pause at the end, and its event, vary with what was said before: silence begins where the samples end.
        samples = np.trim_zeros(np.concatenate(self._blocks), "b") / 32768.0
        while ARPABET.get(self._phonemes[-1][1]) == "[SIL]":
            self._phonemes.pop()
        return samples, [*self._phonemes, (len(samples) / self.sample_rate, "_")]

    def _receive(
        self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[_Event]"
    ) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type:
            if events[index].type == self.PHONEME:
                self._phonemes.append((events[index].audio_position / 1000, events[index].id.phoneme.decode()))
            index += 1
        return 0


def mixed(sentences: list[str], count: int, random: np.random.Generator) -> list[str]:
    """`count` different sentences, each the first half of one and the second half of another, in words."""
    halves = [(words[: (len(words) + 1) // 2], words[(len(words) + 1) // 2 :]) for words in map(str.split, sentences)]
    heads, tails = random.permutation(len(halves)), random.permutation(len(halves))
    pairs = [(heads[n % len(halves)], tails[(n + n // len(halves)) % len(halves)]) for n in range(count)]
    return [" ".join(halves[head][0] + halves[tail][1]) for head, tail in pairs]


def plan(sentences: list[str], per_voice: int, seed: int) -> list[Take]:
    """Every recording of the corpus, by partition and name; no two of them say the same."""
    voices = [
        (partition, voice) for partition, names in VOICES.items() for voice in sorted(names.split(), key=str.lower)
    ]
    texts = iter(mixed(sentences, len(voices) * per_voice, np.random.default_rng(seed)))
    return [
        Take(partition, f"{partition}-{voice.lower()}-{take:02d}", voice, next(texts), (seed, number, take))
        for number, (partition, voice) in enumerate(voices)
        for take in range(per_voice)
    ]


def record(espeak: Espeak, take: Take) -> Recording:
    """Speak, spoil, and label one take."""
    manner = np.random.default_rng(take.seed[:2])  # the voice's own
    random = np.random.default_rng(take.seed)
    clean, phonemes = espeak.say(
        take.sentence,
        take.voice,
        rate=int(manner.integers(145, 200) + random.integers(-12, 13)),
        pitch=int(manner.integers(30, 71) + random.integers(-5, 6)),
        spread=int(random.integers(30, 71)),
    )
    before, after = random.uniform(0.08, 0.25, 2)  # seconds of silence
    clean = np.pad(clean, (int(before * espeak.sample_rate), int(after * espeak.sample_rate)))
    speech = zoo.data.resample(torch.from_numpy(clean), espeak.sample_rate, SAMPLE_RATE).numpy()
    samples = np.round(spoil(speech, random) * 32767).astype(np.int16)
    features = zoo.mfcc(torch.from_numpy(samples.astype(np.float32) / 32768)).numpy()
    starts = [(before + second, mnemonic) for second, mnemonic in phonemes]
    return Recording(take, samples, features, frame_labels(starts, len(speech) / SAMPLE_RATE, len(features)))


def frame_labels(starts: list[tuple[float, str]], end: float, frames: int) -> NDArray[np.uint8]:
    """(T,) class of the phoneme that sounds at the centre of each frame; silence before the first."""
    times, classes = [0.0], ["[SIL]"]
    for (start, mnemonic), (stop, _) in zip(starts, [*starts[1:], (end, "_")], strict=True):
        if mnemonic not in ARPABET:
            msg = f"eSpeak mnemonic {mnemonic!r} has no ARPAbet phoneme; add it to ARPABET"
            raise SystemExit(msg)
        parts = ARPABET[mnemonic].split()
        times += np.linspace(start, stop, len(parts), endpoint=False).tolist()
        classes += parts
    indices = np.array([zoo.PHONEMES.index(name) for name in classes], dtype=np.uint8)
    centres = np.arange(frames) * HOP / SAMPLE_RATE
    return indices[np.searchsorted(times, centres, side="right") - 1]


def spoil(speech: Samples, random: np.random.Generator) -> Samples:
    """The speech through a room, a channel and noise, at a random level with a peak of at most 0.9."""
    wet = echo(speech, random)
    shaped = filtered(wet, channel(len(wet), random))
    noise = filtered(random.standard_normal(len(wet)), tilt(len(wet), random.uniform(0, 1)))
    ratio = 10 ** (random.uniform(*SNR) / 20)
    noisy: Samples = shaped / shaped.std() + noise / noise.std() / ratio
    noisy *= random.uniform(0.1, 0.9) / np.abs(noisy).max()
    return noisy


def echo(speech: Samples, random: np.random.Generator) -> Samples:
    """Add a decaying tail of random reflections: 60 dB down after 0.1 to 0.4 s."""
    seconds = np.arange(int(0.4 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = random.standard_normal(len(seconds)) * 10 ** (-3 * seconds / random.uniform(0.1, 0.4))
    tail *= random.uniform(*WET) / np.linalg.norm(tail)
    tail[0] = 1
    size = len(speech) + len(tail)
    reverberant: Samples = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(tail, size), size)
    return reverberant[: len(speech)]


def channel(samples: int, random: np.random.Generator) -> Samples:
    """(samples // 2 + 1,) gains of a smooth random response with random band edges."""
    hertz = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    knots = np.geomspace(60, SAMPLE_RATE / 2, 8)
    decibels: Samples = np.interp(hertz, knots, random.normal(0, COLOUR, len(knots)))
    low, high = random.uniform(50, 300), random.uniform(3400, 8000)
    edges = 1 / np.sqrt((1 + (low / np.maximum(hertz, 1)) ** 4) * (1 + (hertz / high) ** 8))
    gains: Samples = 10 ** (decibels / 20) * edges
    return gains


def tilt(samples: int, slope: float) -> Samples:
    """(samples // 2 + 1,) gains of coloured noise: flat at slope 0, pink at 0.5, brown at 1."""
    gains: Samples = np.maximum(np.fft.rfftfreq(samples, 1 / SAMPLE_RATE), 50.0) ** -slope
    return gains


def filtered(samples: Samples, gains: Samples) -> Samples:
    """The samples with every frequency multiplied by its gain."""
    result: Samples = np.fft.irfft(np.fft.rfft(samples) * gains, len(samples))
    return result


def frame_set(recordings: list[Recording]) -> zoo.FrameSet:
    """Recordings one after another, as `zoo` takes them."""
    return zoo.FrameSet(
        torch.from_numpy(np.concatenate([recording.features for recording in recordings])),
        torch.from_numpy(np.concatenate([recording.labels for recording in recordings]).astype(np.int64)),
        torch.tensor([0] + [len(recording.labels) for recording in recordings]).cumsum(0),
        zoo.PHONEMES,
        tuple(recording.take.name for recording in recordings),
    )


def write_packed(corpus: dict[str, list[Recording]], path: Path) -> None:
    """One compressed .npz; the same recordings give the same bytes."""
    arrays = {}
    for partition, recordings in corpus.items():
        frames = frame_set(recordings)
        assert frames.labels is not None  # frame_set gives them
        arrays[f"{partition}_features"] = frames.features.half().numpy()
        arrays[f"{partition}_labels"] = frames.labels.numpy().astype(np.uint8)
        arrays[f"{partition}_starts"] = frames.starts.numpy()
        arrays[f"{partition}_names"] = np.array(frames.names)
        arrays[f"{partition}_voices"] = np.array([f"en-us+{recording.take.voice}" for recording in recordings])
    beside = path.with_name(f"{path.name}.tmp.npz")
    np.savez_compressed(beside, allow_pickle=False, **arrays)
    beside.replace(path)


def write_wave(recording: Recording, folder: Path) -> None:
    """The recording itself: 16-bit mono WAV at 16 kHz."""
    with wave.open(str(folder / f"{recording.take.name}.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(recording.samples.astype("<i2").tobytes())


def main() -> None:
    """Read the arguments, make every recording, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the .npz to write; with --folders, the root folder")
    parser.add_argument("--folders", action="store_true", help="write the HW1P2 layout instead of one .npz")
    parser.add_argument("--wave", action="append", default=[], metavar="NAME", help="also write this recording as .wav")
    parser.add_argument("--per-voice", type=int, default=9, help="recordings of each voice (default 9)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that varies (default 0)")
    parser.add_argument("--sentences", type=Path, default=Path(__file__).with_name("sentences.txt"))
    arguments = parser.parse_args()

    espeak = Espeak()
    takes = plan(arguments.sentences.read_text(encoding="utf-8").splitlines(), arguments.per_voice, arguments.seed)
    corpus: dict[str, list[Recording]] = {partition: [] for partition in VOICES}
    with _console.progress("speaking", len(takes)) as advance:
        for take in takes:
            corpus[take.partition].append(record(espeak, take))
            advance(note=take.name)

    folder = arguments.output if arguments.folders else arguments.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.folders:
        for partition, recordings in corpus.items():
            zoo.write_corpus(frame_set(recordings), folder, partition)
    else:
        write_packed(corpus, arguments.output)
    for recording in (recording for recordings in corpus.values() for recording in recordings):
        if recording.take.name in arguments.wave:
            write_wave(recording, folder)
    print(f"{len(takes)} recordings by eSpeak NG {espeak.version} -> {arguments.output}")


if __name__ == "__main__":
    main()
