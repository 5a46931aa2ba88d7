"""The TPU kernels, interpreted on the CPU: against the model's own operations, and as a run takes them up. tests/test_pallas_kernels.py
runs this in a process of its own: one that has started jax may not fork, as other tests do."""
import contextlib
import functools
import importlib.util
import io
import sys
import unittest
from types import SimpleNamespace
from unittest import mock

import torch

import train_tpu
import trm_model
from device import Device
from tests.helpers import ROOT, XLATest
from tests.test_model import admitted, no_minimum, small_model
from trm_model import SwiGLU

HAS_JAX = importlib.util.find_spec("jax") is not None
BATCH, LENGTH, DIM = 6, 19, 32


@functools.cache
def compiled(function):
    import jax
    return jax.jit(functools.partial(function, interpret=True))


def interpreted(function, *tensors):
    """pallas_kernels.call without a TPU: jax interprets the kernel."""
    import jax.numpy as jnp
    results = compiled(function)(*(jnp.asarray(tensor.detach().cpu().float().numpy(), str(tensor.dtype).removeprefix("torch.")) for tensor in tensors))
    return [torch.tensor(result.astype(jnp.float32).tolist()).to(tensors[0].device, getattr(torch, str(result.dtype))) for result in results]


def random_input(seed, dtype=torch.float32):
    return torch.randn(BATCH, LENGTH, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


@unittest.skipUnless(HAS_JAX, "jax is not installed here")
class Kernels(unittest.TestCase):
    """float32, where two ways to the same number are close."""

    def close(self, ours, plain, tolerance=1e-5):
        self.assertEqual(ours.shape, plain.shape)
        self.assertLess(((ours - plain).norm() / plain.norm()).item(), tolerance)

    def mixing(self, axis):
        """(SwiGLU, its halved weights, input that needs a gradient, output, gradient of the output)."""
        swiglu = SwiGLU((None, LENGTH, DIM)[axis], 4, torch.Generator().manual_seed(axis))
        x, grad = random_input(3).requires_grad_(), random_input(4)
        gate, up, down = swiglu.weights()
        return swiglu, (0.5 * gate, up, down), x, swiglu(x, swiglu.weights(), axis), grad

    def test_token_mixing_and_its_gradient(self):
        import pallas_kernels
        swiglu, weights, x, out, grad = self.mixing(1)
        self.close(interpreted(pallas_kernels.token_mixing, x, *weights)[0], out)
        x_grad, *sums = interpreted(pallas_kernels.token_mixing_gradient, x, grad, *weights)
        plain, gate_up, down = torch.autograd.grad(out, (x, *swiglu.parameters()), grad)
        self.close(x_grad, plain)
        for ours, plain in zip(sums, (*gate_up.chunk(2), down)):
            self.assertEqual(len(ours), 2)          # the cores' shares
            self.close(ours.sum(0), plain)

    def test_channel_mixing_and_what_it_keeps(self):
        import pallas_kernels
        swiglu, weights, x, out, _ = self.mixing(2)
        self.close(interpreted(pallas_kernels.channel_mixing, x, *weights)[0], out)
        ours, gate, up, scale = interpreted(pallas_kernels.channel_mixing_kept, x, *weights)
        self.close(ours, out)
        self.close(gate, 2 * x @ weights[0].T)
        self.close(up, x @ weights[1].T)
        self.close(scale, (x + swiglu.mixed(x, swiglu.weights(), 2)).square().mean(-1, keepdim=True).add(1e-5).rsqrt())

    def test_a_width_that_is_taken_in_parts(self):
        import pallas_kernels
        _, weights, x, out, _ = self.mixing(2)
        with mock.patch.object(pallas_kernels, "WIDTH_A_TIME", 100):
            in_parts = functools.partial(pallas_kernels.channel_mixing)         # another function, or an earlier trace would be used
            self.close(interpreted(in_parts, x, *weights)[0], out)

    def test_any_number_of_examples(self):
        import pallas_kernels
        swiglu, weights, x, out, grad = self.mixing(1)
        for count in (1, 3, 6):
            with self.subTest(count=count):
                self.close(interpreted(pallas_kernels.token_mixing, x[:count], *weights)[0], out[:count])
                x_grad, *sums = interpreted(pallas_kernels.token_mixing_gradient, x[:count], grad[:count], *weights)
                plain, gate_up, _ = torch.autograd.grad(out[:count], (x, *swiglu.parameters()), grad[:count], retain_graph=True)
                self.close(x_grad, plain[:count])
                self.close(sums[0].sum(0), gate_up.chunk(2)[0])

    def test_examples_a_pass_are_as_many_as_fit(self):
        from pallas_kernels import fits
        for length, dim, width, axis, fit in ((97, 512, 1536, 2, True), (97, 768, 2048, 2, True), (97, 1024, 2816, 2, False), (97, 1024, 512, 1, True),
                                              (97, 2048, 512, 1, False), (916, 512, 2560, 1, False), (97, 96, 256, 2, False)):
            with self.subTest(length=length, dim=dim, axis=axis):
                self.assertIs(fits(length, dim, width, axis), fit)


@unittest.skipUnless(HAS_JAX and importlib.util.find_spec("torch_xla"), "jax or torch_xla is not installed here")
class Training(unittest.TestCase):
    """On the CPU, where XLA's contractions are torch.tensordot's."""

    def setUp(self):
        import xla_mixing
        patch = mock.patch.object(xla_mixing, "contract", lambda a, a_axes, b, b_axes: torch.tensordot(a.float(), b.float(), tuple(
            [axes] if isinstance(axes, int) else list(axes) for axes in (a_axes, b_axes))))
        patch.start()
        self.addCleanup(patch.stop)

    def gradients(self, model, carry):
        rows = model.puzzle_rows(carry).requires_grad_()
        loss, _, new_carry = trm_model.act_step(model, carry, rows, no_minimum(carry))
        return [t.detach() for t in (loss, new_carry.z_H, *torch.autograd.grad(loss, [*model.parameters(), rows]))]

    def check_same(self, **changes):
        import pallas_kernels
        model = small_model(L_layers=2, H_cycles=2, **changes)
        carry = admitted(model)
        plain, calls = self.gradients(model, carry), []

        def call(function, *tensors):
            calls.append(function.__name__)
            return interpreted(function, *tensors)
        with mock.patch.object(pallas_kernels, "fits", lambda *_: True), mock.patch.object(pallas_kernels, "call", call):
            pallas_kernels.use(model)
            self.assertFalse(any(module.in_kernel for module in model.modules() if isinstance(module, SwiGLU)))      # this model is float32
            for module in model.modules():
                module.in_kernel = True
            for ours, theirs in zip(self.gradients(model, carry), plain, strict=True):
                self.assertLess(((ours - theirs).norm() / theirs.norm()).item(), 2e-5)
        return [calls.count(f"{name}") for name in ("token_mixing", "token_mixing_gradient", "channel_mixing", "channel_mixing_kept")]

    def test_the_same_gradients(self):
        # two layers, three calls of the network a cycle, one cycle without gradient and one with
        for changes, calls in ((dict(), [12, 6, 6, 6]), (dict(mlp_t=False, pos_encodings="rope"), [0, 0, 6, 6]),
                               (dict(activation_checkpointing=True), [18, 6, 6, 12])):
            with self.subTest(**changes):
                self.assertEqual(self.check_same(**changes), calls)

    def used(self, call):
        """What train_tpu.use_kernels makes of a device on which `call` is what a kernel does: (each SwiGLU in a kernel?, what it says)."""
        import pallas_kernels
        device = Device("cpu")
        device.name = "tpu"
        model = small_model(forward_dtype="bfloat16")
        config = SimpleNamespace(training=SimpleNamespace(pallas_kernels=True))
        with mock.patch.object(pallas_kernels, "fits", lambda *_: True), mock.patch.object(pallas_kernels, "call", call), \
                contextlib.redirect_stderr(io.StringIO()) as said:
            train_tpu.use_kernels(model, config, device, 4)
        return [module.in_kernel for module in model.modules() if isinstance(module, SwiGLU)], said.getvalue()

    def test_a_run_on_a_tpu_uses_kernels_that_compute_the_same_there_and_no_others(self):
        def slightly_wrong(function, *tensors):
            results = interpreted(function, *tensors)
            return [1.05 * result if function.__name__ == "token_mixing_gradient" else result for result in results]

        def refused(function, *tensors):
            raise RuntimeError("INTERNAL: Mosaic failed\nto compile")
        for call, in_kernel, expected in ((interpreted, True, r"^$"), (slightly_wrong, False, r"^warning: the TPU kernels are not used.* axis 1 is 0\.0[45]"),
                                          (refused, False, r"^warning: .*: INTERNAL: Mosaic failed \(training.pallas_kernels=false")):
            with self.subTest(call=call.__name__):
                used, said = self.used(call)
                self.assertEqual(used, [in_kernel] * 4)
                self.assertRegex(said, expected)
        with mock.patch.dict(sys.modules, {"jax": None}):
            sys.modules.pop("pallas_kernels")
            with contextlib.redirect_stderr(io.StringIO()) as said:
                train_tpu.use_kernels(small_model(), SimpleNamespace(training=SimpleNamespace(pallas_kernels=True)), SimpleNamespace(name="tpu", rank=0), 4)
        self.assertRegex(said.getvalue(), r"^warning: .*jax.*\(training.pallas_kernels=false")


@unittest.skipUnless(HAS_JAX, "jax is not installed here")
class Traced(XLATest):
    def test_traced_for_a_tpu(self):
        """The program has the kernel, with what it costs, as one operation."""
        import pallas_kernels
        import torch_xla
        sys.path.insert(0, str(ROOT / "analysis"))
        import tpu_hlo
        swiglu = SwiGLU(LENGTH, 4, torch.Generator().manual_seed(0)).to(self.device)
        x = random_input(0, torch.bfloat16).to(self.device).requires_grad_()
        out = pallas_kernels.TokenMixing.apply(x, *swiglu.weights())
        grad, = torch.autograd.grad(out.float().sum(), x)
        text = torch_xla._XLAC._get_xla_tensors_hlo([out, grad])
        self.assertEqual(text.count('custom_call_target="tpu_custom_call"'), 2)
        self.assertEqual(tpu_hlo.product_flops(text), (1 + 3) * 2 * BATCH * DIM * 3 * LENGTH * 256)


if __name__ == "__main__":
    unittest.main()
