import contextlib
import dataclasses
import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first used: they run on the CPU then

os.environ["DECOMPK_MEASURE"] = "0"  # which kernel runs does not depend on what else the machine does

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # processes that tests start take cores only to compute
torch.set_num_threads(1)  # pytest-xdist already uses every core


def _hasten_interpreter():
    """Two thirds off Triton's interpreter, which builds a table anew for every dtype that it is asked of, at every
    call of a device function puts its own operators where they are already, and computes every integer again in 64
    bits to assert, where debugging alone asserts, that it did not overflow."""
    from triton import language
    from triton.runtime import interpreter

    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope

    def patch_what_is_not_yet(fn):
        seen = [value for value in fn.__globals__.values() if value is language or value is language.core]
        mine = any(language.core.is_builtin(value.load) for value in seen)
        return patch(fn) if mine or not seen else nothing()

    interpreter._patch_lang = patch_what_is_not_yet
    find, known = interpreter._get_np_dtype, {}

    def remembered(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = remembered
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


with contextlib.suppress(ImportError, AttributeError, TypeError):  # no Triton here, or another
    _hasten_interpreter()


def pytest_collection_finish():
    """All that was imported stays: the collector need not walk over it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
