"""The shapes of the leaves of real models; no weights."""

from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def equal(megabytes: float, leaves: int) -> Shapes:
    """Equal matrices of 64 columns, with megabytes of float32 in all."""
    return [(max(1, round(megabytes * 1e6 / 4 / leaves / 64)), 64)] * leaves


def lstm() -> Shapes:
    """Two layers of 1,500 on 10,000 words, the large model of Zaremba et al. (2014)."""
    layers = [(3000, 6000), (6000,)] * 2
    return [(10_000, 1500), *layers, (1500, 10_000), (10_000,)]


def resnet50() -> Shapes:
    """ResNet-50 (He et al., 2015): 161 leaves, most of them tiny, 25.6 million."""
    shapes: Shapes = [(7, 7, 3, 64), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes = [(1, inputs, width), (3, width, width), (1, width, 4 * width)]
            if block == 0:
                sizes.append((1, inputs, 4 * width))
            for side, fan_in, fan_out in sizes:
                shapes += [(side, side, fan_in, fan_out), (fan_out,), (fan_out,)]
            inputs = 4 * width
    return [*shapes, (2048, 1000), (1000,)]


def gpt2() -> Shapes:
    """GPT-2 small (Radford et al., 2019): 148 leaves, 124 million."""
    block: Shapes = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [(50_257, 768), (1024, 768), *block * 12, (768,), (768,)]


def transformer_1b() -> Shapes:
    """A decoder of 1.2 billion: 16 layers of 2,048 with gated feed-forward layers."""
    block: Shapes = [(2048,), (2048, 2048), (2048, 512), (2048, 512), (2048, 2048)]
    block += [(2048,), (2048, 8192), (2048, 8192), (8192, 2048)]
    return [(128_256, 2048), *block * 16, (2048,)]


def mixture_of_experts() -> Shapes:
    """Eight layers of 512 with 16 experts each, stacked: 151 million."""
    block: Shapes = [(512,), (512, 1536), (512, 512), (512,), (512, 16)]
    block += [(16, 512, 1024), (16, 1024, 512)]
    return [(16_000, 512), *block * 8, (512,)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "LSTM": lstm,
    "ResNet-50": resnet50,
    "GPT-2 small": gpt2,
    "mixture of experts": mixture_of_experts,
    "1B transformer": transformer_1b,
}
