"""Writes tools/survey_timm.md: whether timm's networks, packed, compute what their members compute alone."""

import contextlib
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from alone import errors_of, members_of
from zoo import torchvision  # noqa: F401  before timm, which imports it too

# isort: split
import timm

import decompk

K, N = 3, 3
TINY_LEVIT = dict(img_size=64, embed_dim=(16, 24, 32), key_dim=4, num_heads=(2, 3, 4), depth=(1, 1, 1))
TOLERANCE = 1e-9
NETWORKS = {  # the smallest of each family: pixels, or them and options that make it smaller still
    "aimv2_1b_patch14_224": dict(pixels=56, depth=2, embed_dim=64, num_heads=2),
    "beit_base_patch16_224": dict(pixels=64, depth=2, embed_dim=64, num_heads=2),
    "cait_xxs24_224": dict(pixels=64, depth=3),
    "convnext_atto": 32,
    "cpubone_nano": 96,
    "cs3darknet_s": 32,
    "cspnext_tiny": 32,
    "deit3_small_patch16_224": dict(pixels=64, depth=2),
    "dla46_c": 32,
    "edgenext_xx_small": 64,
    "efficientvim_m1": 32,
    "efficientvit_b0": 32,
    "efficientvit_m0": dict(pixels=64, img_size=64),
    "ese_vovnet19b_slim_dw": 32,
    "eva02_tiny_patch14_224": dict(pixels=56, depth=2),
    "fasternet_t0": 32,
    "fastvit_t8": 32,
    "flexivit_small": dict(pixels=64, depth=2),
    "gernet_s": 32,
    "ghostnet_050": 32,
    "hardcorenas_a": 32,
    "hgnetv2_b0": 32,
    "hrnet_w18_small": 32,
    "iformer_t": 32,
    "inception_next_atto": 32,
    "lcnet_035": 32,
    "legacy_seresnet18": 32,
    "levit_128s": dict(pixels=64, **TINY_LEVIT),
    "levit_conv_128s": dict(pixels=64, **TINY_LEVIT),
    "lowformer_b0": 32,
    "mambaout_femto": 32,
    "mixnet_s": 32,
    "mobilenetv3_small_050": 32,
    "mobilenetv4_conv_small_035": 32,
    "mobileone_s0": 32,
    "mobilevit_xxs": 64,
    "mobilevitv2_050": 64,
    "naflexvit_base_patch16_gap": dict(pixels=64, depth=2, embed_dim=64, num_heads=2),
    "pvt_v2_b0": 32,
    "regnetx_002": 32,
    "regnety_002": 32,
    "regnetz_005": 64,  # at 32 the last statistics are of 3 values
    "repghostnet_050": 32,
    "repvgg_a0": 32,
    "resnet10t": 32,
    "resnetv2_18": 32,
    "samvit_base_patch16": dict(pixels=64, depth=2, embed_dim=64, num_heads=2),
    "shvit_s1": 32,
    "skresnet18": 32,
    "starnet_s050": 32,
    "swin_tiny_patch4_window7_224": dict(pixels=64, window_size=4, depths=(2, 2, 2, 2)),
    "swinv2_cr_tiny_224": dict(pixels=64, img_size=64, window_size=2, depths=(1, 1, 2, 1)),
    "swinv2_tiny_window8_256": dict(pixels=64, window_size=4, depths=(1, 1, 2, 1)),
    "test_vit_relpos": dict(pixels=160),
    "tiny_vit_5m_224": dict(
        pixels=64, embed_dims=(8, 16, 16, 24), window_sizes=(4, 4, 4, 2), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)
    ),
    "tnt_s_patch16_224": dict(pixels=64, depth=2),
    "twins_pcpvt_small": dict(pixels=64, depths=(1, 1, 1, 1)),
    "twins_svt_small": dict(pixels=64, depths=(1, 1, 1, 1)),
    "visformer_tiny": dict(pixels=64),
    "vit_tiny_patch16_224": dict(pixels=64, depth=2),
    "vit_base_patch16_rope_mixed_224": dict(pixels=64, depth=2, embed_dim=64, num_heads=2),
    "test_byobnet": 64,
    "test_efficientnet_evos": 64,
    "test_nfnet": 64,
    "xcit_nano_12_p16_224": dict(pixels=64, depth=2),
}


def made(name, pixels, **options):
    """A function that makes one fresh network on images of so many pixels."""

    def make():
        with contextlib.suppress(TypeError):  # many take no img_size
            return timm.create_model(name, num_classes=10, img_size=pixels, **options)
        return timm.create_model(name, num_classes=10, **options)

    return make


def survey(name, pixels, **options):
    """(modules that run member by member, the largest relative error, verdict)."""
    members = members_of(made(name, pixels, **options), K)
    own, shared = torch.randn(K, N, 3, pixels, pixels).double(), torch.randn(2, 3, pixels, pixels).double()
    verdict = ""
    for how in ({}, {"input_dims": 4}, {"member_by_member": [""]}):
        try:
            packed = decompk.pack(members, **how)
            errors = errors_of(
                members, lambda net, k: net(own if k is None else own[k]), lambda net, k: net(shared), packed
            )
        except decompk.DecompkError as error:
            verdict += f"refused: {error} "
            continue
        apart = packed.describe().count("member by member: ")
        wrong = [stage for stage, error in errors.items() if error >= TOLERANCE]
        found = f"differs in {', '.join(wrong)}" if wrong else "equal"
        return apart, max(errors.values()), verdict + found + (f" with {how}" if how else "")
    return "-", math.nan, verdict


def main() -> None:
    rows, equal = [], 0
    for name in sys.argv[1:] or NETWORKS:
        spec = NETWORKS[name]
        apart, error, verdict = survey(name, **(spec if isinstance(spec, dict) else {"pixels": spec}))
        equal += verdict.startswith("equal")
        family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        rows.append((family, f"| {family} | {name} | {apart} | {error:.0e} | {verdict} |"))
        print(rows[-1][1], flush=True)
    families = len({family for family, _ in rows})
    head = (
        f"{equal} of {len(rows)} networks of {families} families of timm {timm.__version__} pack, and compute in "
        f"float64 what their members compute alone, to {TOLERANCE:.0e} of the largest value: outputs in eval (twice) "
        "and train mode, gradients, statistics, the weights after a step, and outputs after it, packed and unpacked. "
        f"Made by `python tools/survey_timm.py`, torch {torch.__version__.partition('+')[0]}."
    )
    columns = [
        "| family | network | modules run member by member | error | verdict |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    table = "\n".join([head, "", *columns, *(row for _, row in sorted(rows))])
    Path(__file__).with_name("survey_timm.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
