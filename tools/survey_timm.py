"""Writes tools/survey_timm.md: whether timm's networks, packed, compute what their members compute alone."""

import contextlib
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from alone import errors_of, members_of
from zoo import torchvision  # noqa: F401  timm imports it

import decompk

K, N = 3, 3
NETWORKS = {  # name: pixels, or further options
    "aimv2_1b_patch14_224": dict(pixels=56, depth=2, embed_dim=64, num_heads=2),
    "bat_resnext26ts": 256,
    "beit_base_patch16_224": dict(pixels=64, depth=2, embed_dim=64, num_heads=2),
    "botnet26t_256": dict(pixels=128),
    "caformer_s18": dict(pixels=64, depths=(1, 1, 1, 1)),
    "cait_xxs24_224": dict(pixels=64, depth=3),
    "coat_tiny": 64,
    "coatnet_nano_rw_224": dict(pixels=64),
    "convformer_s18": dict(pixels=64, depths=(1, 1, 1, 1)),
    "convit_tiny": dict(pixels=64, depth=12),
    "convmixer_768_32": 64,
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "cpubone_nano": 96,
    "crossvit_9_240": dict(pixels=240, depth=((1, 1, 0), (1, 1, 0))),
    "cs3darknet_s": 64,
    "csatv2": 128,
    "cspnext_tiny": 64,
    "cspresnet50": 64,
    "davit_tiny": dict(pixels=64, depths=(1, 1, 1, 1)),
    "deepseek_vit_412m": dict(pixels=56, depth=2, embed_dim=64, num_heads=2),
    "deit3_small_patch16_224": dict(pixels=64, depth=2),
    "deit_tiny_distilled_patch16_224": dict(pixels=64, depth=2),
    "densenet121": 64,
    "densenetblur121d": 64,
    "dla46_c": 64,
    "dla60_res2net": 64,
    "dpn48b": 64,
    "eca_nfnet_l0": 64,
    "ecaresnet26t": 64,
    "edgenext_xx_small": 64,
    "efficientformer_l1": dict(pixels=224, layers=(1, 1, 1, 2)),
    "efficientformerv2_s0": 64,
    "efficientnet_b0": 64,
    "efficientnet_cc_b0_4e": 64,
    "efficientvim_m1": 64,
    "efficientvit_b0": 64,
    "efficientvit_m0": 224,
    "ese_vovnet19b_slim_dw": 64,
    "eva02_tiny_patch14_224": dict(pixels=56, depth=2),
    "fasternet_t0": 64,
    "fastvit_t8": 64,
    "fbnetv3_b": 64,
    "flexivit_small": dict(pixels=64, depth=2),
    "focalnet_tiny_srf": dict(pixels=64, depths=(1, 1, 1, 1)),
    "gcresnet33ts": 64,
    "gcvit_xxtiny": dict(pixels=224, depths=(1, 1, 1, 1)),
    "gemma4_vit_167m": dict(pixels=96, depth=2, embed_dim=64, num_heads=2),
    "gernet_s": 64,
    "ghostnet_050": 64,
    "ghostnetv2_100": 64,
    "ghostnetv3_050": 64,
    "gmixer_12_224": 64,
    "gmlp_ti16_224": 64,
    "halonet26t": 256,
    "hardcorenas_a": 64,
    "hgnetv2_b0": 64,
    "hiera_tiny_224": dict(pixels=224, stages=(1, 1, 1, 1)),
    "sam2_hiera_tiny": dict(pixels=128, stages=(1, 1, 1, 1), global_att_blocks=(2,)),
    "hrnet_w18_small": 64,
    "iformer_t": 64,
    "inception_next_atto": 64,
    "inception_resnet_v2": 75,
    "inception_v3": 75,
    "inception_v4": 75,
    "lambda_resnet26t": 128,
    "lcnet_035": 64,
    "lcnetv2_small": 64,
    "legacy_seresnet18": 64,
    "legacy_xception": 64,
    "levit_128s": 224,
    "levit_conv_128s": 224,
    "lowformer_b0": 64,
    "mambaout_femto": 64,
    "maxvit_pico_rw_256": 64,
    "mixer_s32_224": 64,
    "mixnet_s": 64,
    "mnasnet_small": 64,
    "mobilenetv2_035": 64,
    "mobilenetv3_small_050": 64,
    "mobilenetv4_conv_small_035": 64,
    "mobilenetv4_hybrid_medium_075": 64,
    "mobilenetv5_300m": 64,
    "mobileone_s0": 64,
    "mobilevit_xxs": 64,
    "mobilevitv2_050": 64,
    "mvitv2_tiny": dict(pixels=64, depths=(1, 1, 1, 1)),
    "naflexvit_base_patch16_gap": dict(pixels=64, depth=2, embed_dim=64, num_heads=2),
    "nasnetalarge": dict(pixels=64, num_blocks=1),
    "nest_tiny": dict(pixels=128, depths=(1, 1, 1)),
    "nextvit_small": dict(pixels=64, depths=(1, 1, 2, 1)),
    "nf_resnet26": 64,
    "pit_ti_224": dict(pixels=224),
    "pnasnet5large": 64,
    "poolformer_s12": dict(pixels=64, layers=(1, 1, 1, 1)),
    "pvt_v2_b0": 64,
    "qwen3_vit_88m": dict(pixels=64, depth=2, embed_dim=64, num_heads=2),
    "rdnet_tiny": 64,
    "regnetx_002": 64,
    "regnety_002": 64,
    "regnetz_005": 64,
    "repghostnet_050": 64,
    "repvgg_a0": 64,
    "repvit_m0_9": 64,
    "res2net50_14w_8s": 64,
    "resmlp_12_224": 64,
    "resnest14d": 64,
    "resnet10t": 64,
    "resnet50_clip": dict(pixels=64),
    "resnet50_gn": 64,
    "resnetblur50": 64,
    "resnetrs50": 64,
    "resnetv2_18": 64,
    "resnetv2_50d_evos": 64,
    "resnetv2_50d_frn": 64,
    "resnetv2_50x1_bit": 64,
    "rexnet_100": 64,
    "rexnetr_100": 64,
    "samvit_base_patch16": dict(pixels=64, depth=2, embed_dim=64, num_heads=2),
    "seresnext26d_32x4d": 64,
    "selecsls42": 64,
    "semnasnet_075": 64,
    "sequencer2d_s": dict(pixels=64, layers=(1, 1, 1, 1)),
    "shvit_s1": 64,
    "skresnet18": 64,
    "spnasnet_100": 64,
    "starnet_s050": 64,
    "swiftformer_xs": 224,
    "swin_tiny_patch4_window7_224": dict(pixels=64, window_size=4, depths=(2, 2, 2, 2)),
    "swinv2_cr_tiny_224": dict(pixels=64, img_size=64, window_size=2, depths=(1, 1, 2, 1)),
    "swinv2_tiny_window8_256": dict(pixels=64, window_size=4, depths=(1, 1, 2, 1)),
    "test_vit_relpos": dict(pixels=160),
    "tf_efficientnetv2_b0": 64,
    "tiny_vit_5m_224": 64,
    "tinynet_e": 64,
    "tnt_s_patch16_224": dict(pixels=64, depth=2),
    "tresnet_m": 64,
    "twins_pcpvt_small": dict(pixels=64, depths=(1, 1, 1, 1)),
    "twins_svt_small": dict(pixels=64, depths=(1, 1, 1, 1)),
    "vgg11_bn": 64,
    "visformer_tiny": dict(pixels=64),
    "vit_tiny_patch16_224": dict(pixels=64, depth=2),
    "vit_tiny_r_s16_p8_224": dict(pixels=64),
    "vit_base_patch16_rope_mixed_224": dict(pixels=64, depth=2, embed_dim=64, num_heads=2),
    "vitamin_small_224": dict(pixels=64),
    "volo_d1_224": dict(pixels=64, layers=(1, 1, 1, 1)),
    "xception41": 64,
    "xcit_nano_12_p16_224": dict(pixels=64, depth=2),
}
STAGES = ("eval", "eval again", "train", "gradients", "statistics", "weights", "after a step", "unpacked")


def made(name, pixels, **options):
    """A function that makes one fresh network on images of so many pixels."""
    import timm

    def make():
        with contextlib.suppress(TypeError):  # many take no img_size
            return timm.create_model(name, num_classes=10, img_size=pixels, **options)
        return timm.create_model(name, num_classes=10, **options)

    return make


def survey(name, pixels, **options):
    """(modules run member by member, why, the errors of each stage, verdict)."""
    members = members_of(made(name, pixels, **options))
    own, shared = (torch.randn(K, N, 3, pixels, pixels).double(), torch.randn(2, 3, pixels, pixels).double())

    def call(net, k):
        return net(own if k is None else own[k])

    def again(net, k):
        return net(shared)

    verdict = []
    for how in ({}, {"input_dims": 4}, {"member_by_member": [""]}):
        try:
            packed = decompk.pack(members, **how)
            errors = errors_of(members, call, again, packed)
            lines = re.findall("member by member: (.*)", packed.describe())
        except decompk.DecompkError as error:
            verdict.append(f"refused with {how}: {str(error)[:90]}…")
            continue
        worst = max(errors.values())
        verdict.append(f"equal{f' with {how}' if how else ''}" if worst < 1e-9 else "DIFFERS: " + ", ".join(s for s in errors if errors[s] >= 1e-9))
        return len(lines), sorted(set(lines)), errors, "; ".join(verdict)
    return "-", [], {}, "; ".join(verdict)


def main() -> None:
    import timm

    rows = []
    for name in sys.argv[1:] or NETWORKS:
        spec = NETWORKS[name]
        start = time.perf_counter()
        try:
            whole, why, errors, verdict = survey(name, **(spec if isinstance(spec, dict) else dict(pixels=spec)))
        except Exception as error:
            whole, why, errors = "-", [], {}
            verdict = f"CRASH: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        family = timm.models._registry._model_to_module[name]
        worst = max(errors.values(), default=float("nan"))
        rows.append(f"| {family} | {name} | {whole} | {worst:.0e} | {verdict} |")
        print(rows[-1], "; ".join(why)[:300], f"{time.perf_counter() - start:.1f} s", flush=True)
        if "equal" not in verdict:
            print("    ", {k: f"{v:.0e}" for k, v in errors.items()}, flush=True)
    if len(sys.argv) > 1:
        return


if __name__ == "__main__":
    main()
