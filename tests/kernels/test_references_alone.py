"""NaViT without kernels (`VLPARTS_BACKENDS=none`): the references run, and agree with the kernels to rounding."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file

PROGRAM = """
    import sys
    from unittest import mock
    import torch
    from safetensors.torch import save_file
    from tests.tiny import navit, packed_images

    torch.set_num_threads(1)
    model = navit(hidden_size=64, intermediate_size=128, num_hidden_layers=3, rotary_theta=100.0, use_qk_norm=False)
    patches, grids = packed_images([(16, 17), (17, 16), (3, 5), (3, 5), (20, 20)])
    patches.requires_grad_()
    outputs = model(patches, grids)
    (outputs.pooler_output.sin().sum() + outputs.last_hidden_state.cos().sum()).backward()
    found = {"hidden": outputs.last_hidden_state, "pooled": outputs.pooler_output, "patches": patches.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, sys.argv[1])
"""

KERNELS = """
    import torch
    import transformers, vlparts
    from vlparts.backends import backend_status
    from vlparts.parts import (
        ops_activations, ops_attention, ops_attention_reference, ops_linear, ops_rms_norm, ops_rotary, packed_segments
    )
    names = ("varlen_attention", "linear", "rms_norm", "tokens_per_pass", "rotary", "rotary_pair", "gelu", "swiglu")
    assert not any(status.active for status in backend_status().values()), backend_status()
    for name in names:
        for key in ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA"):
            kernel = f"vlparts::{name}"
            own = torch._C._dispatch_has_kernel_for_dispatch_key(kernel, key)
            assert not own, (kernel, key)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(kernel, "CompositeImplicitAutograd"), kernel
    x, weight = torch.randn(5, 8), torch.randn(8)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    q = torch.randn(5, 2, 8)
    ops = torch.ops.vlparts
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), ops_rms_norm.rms_norm_reference(x, weight, 1e-6))
    assert torch.equal(ops.linear(x, torch.eye(8), weight), torch.nn.functional.linear(x, torch.eye(8), weight))
    expected = ops_attention_reference.packed_attention_reference(q, q, q, cu, cu, 3, 3)
    assert torch.equal(ops.varlen_attention(q, q, q, cu, cu, 3, 3), expected)
    assert ops.tokens_per_pass(x, 10**9) == 0
"""


def run(program: str, *arguments: str, **variables: str) -> None:
    """Run a program in a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name != "VLPARTS_BACKENDS"} | variables
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr


def test_no_kernel_is_registered_and_the_operations_are_the_references() -> None:
    run(KERNELS, VLPARTS_BACKENDS="none")


def test_a_model_gives_the_same_outputs_and_gradients(tmp_path: Path) -> None:
    run(PROGRAM, str(tmp_path / "kernels"))
    run(PROGRAM, str(tmp_path / "references"), VLPARTS_BACKENDS="none")
    kernels, references = load_file(tmp_path / "kernels"), load_file(tmp_path / "references")
    assert kernels.keys() == references.keys()
    for name, expected in references.items():
        scale = expected.abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            kernels[name] / scale,
            expected / scale,
            atol=1e-5,
            rtol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
