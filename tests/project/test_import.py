"""`import polyhead` is light: what only some commands need is imported when they need it."""

import subprocess
import sys

import pytest

HEAVY = (
    "transformers",
    "accelerate",
    "plotly",
    "pandas",
    "jinja2",
    "safetensors",
    "gguf",
    "scipy",
    "torch._dynamo",
    "triton",
)


def modules_after(code: str) -> set[str]:
    """The top-level packages that are loaded after `code`, and `torch._dynamo` where that is."""
    program = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines())
    return {name.partition(".")[0] for name in loaded} | ({"torch._dynamo"} & loaded)


def test_import_is_light():
    loaded = modules_after("import polyhead")
    assert not loaded & set(HEAVY)


def test_attention_does_not_load_the_compiler():
    code = """
import torch, polyhead as ph
q = torch.randn(1, 2, 300, 4, requires_grad=True)
ph.attend(q, q, q, mask=ph.window(8), score=ph.alibi(2)).sum().backward()
ph.build("mha", dim=8, heads=2)(torch.randn(1, 3, 8))
"""
    assert "torch._dynamo" not in modules_after(code)


def test_every_public_name_exists_in_any_order():
    code = """
import random
import polyhead
names = list(polyhead.__all__)
for seed in range(3):
    random.Random(seed).shuffle(names)
    for name in names:
        getattr(polyhead, name)
"""
    modules_after(code)


def test_command_line_starts_light():
    assert not modules_after("import polyhead.cli") & set(HEAVY)


@pytest.mark.parametrize("name", ["attend", "papers", "reference"])
def test_a_function_wins_over_the_module_of_its_name(name):
    modules_after(f"import polyhead.{name}, polyhead; assert callable(polyhead.{name})")


def test_dir_lists_what_is_public():
    import polyhead

    assert set(polyhead.__all__) <= set(dir(polyhead))
    assert len(polyhead.__all__) == len(set(polyhead.__all__))
