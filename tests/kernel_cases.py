"""The TPU kernels, interpreted on the CPU: what they compute, and when a run uses them.

tests/test_pallas_kernels.py runs this in a process of its own: a process that has started jax must
not fork, as other tests do.
"""

import contextlib
import functools
import io
import math
import sys
import unittest
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import torch
import torch_xla

import mixing
import pallas_kernels
import pallas_mixing
import tpu_types
import trm_model
import xla_mixing
from collectives import Workers
from device import Device
from layers import SwiGLU, swiglu
from tests.helpers import XLATest
from tests.test_model import admitted, no_minimum, small_model

# tests/__init__.py puts analysis/ on the path
import tpu_hlo  # isort: skip

BATCH, LENGTH, DIM = 6, 19, 32
# with two cores a chip, and with one
V4, V6E = tpu_types.GENERATIONS["v4"], tpu_types.GENERATIONS["v6e"]


@functools.cache
def compiled(function, chip):
    return jax.jit(functools.partial(function, chip=chip, interpret=True))


def interpreted(function, chip, *tensors):
    """pallas_mixing.call without a TPU: jax interprets the kernel."""

    def to_jax(tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        return jnp.asarray(tensor.detach().cpu().float().numpy(), dtype)

    def to_torch(result):
        tensor = torch.tensor(result.astype(jnp.float32).tolist())
        return tensor.to(tensors[0].device, getattr(torch, str(result.dtype)))

    return [to_torch(result) for result in compiled(function, chip)(*map(to_jax, tensors))]


def random_input(seed, dtype=torch.float32, count=BATCH):
    return torch.randn(count, LENGTH, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Kernels(unittest.TestCase):
    """In float32, where two ways to the same number give nearly the same one."""

    def close(self, ours, plain, tolerance=1e-5):
        self.assertEqual(ours.shape, plain.shape)
        self.assertLess(((ours - plain).norm() / plain.norm()).item(), tolerance)

    def mixing(self, axis):
        """(SwiGLU, its weights with a halved gate, input, output, gradient of the output)."""
        module = SwiGLU((None, LENGTH, DIM)[axis], 4, torch.Generator().manual_seed(axis))
        x, grad = random_input(3).requires_grad_(), random_input(4)
        gate, up, down = module.weights()
        return module, (0.5 * gate, up, down), x, module(x, module.weights(), axis), grad

    def test_token_mixing_and_its_gradient(self):
        module, weights, x, out, grad = self.mixing(1)
        self.close(interpreted(pallas_kernels.token_mixing, V4, x, *weights)[0], out)
        x_grad, *sums = interpreted(pallas_kernels.token_mixing_gradient, V4, x, grad, *weights)
        plain, gate_up, down = torch.autograd.grad(out, (x, *module.parameters()), grad)
        self.close(x_grad, plain)
        for ours, plain in zip(sums, (*gate_up.chunk(2), down)):
            self.assertEqual(len(ours), 2)  # one sum for each core
            self.close(ours.sum(0), plain)

    def test_channel_mixing_and_what_it_keeps(self):
        module, weights, x, out, _ = self.mixing(2)
        self.close(interpreted(pallas_kernels.channel_mixing, V4, x, *weights)[0], out)
        ours, gate, up, scale = interpreted(pallas_kernels.channel_mixing_kept, V4, x, *weights)
        self.close(ours, out)
        self.close(gate, 2 * x @ weights[0].T)
        self.close(up, x @ weights[1].T)
        mixed = x + swiglu(x, module.weights(), 2)
        self.close(scale, mixed.square().mean(-1, keepdim=True).add(1e-5).rsqrt())

    def test_a_width_that_is_taken_in_parts(self):
        _, weights, x, out, _ = self.mixing(2)
        with mock.patch.object(pallas_kernels, "WIDTH_A_TIME", 100):
            # a new function, or the trace of another test would be used
            in_parts = functools.partial(pallas_kernels.channel_mixing)
            self.close(interpreted(in_parts, V4, x, *weights)[0], out)

    def test_any_number_of_examples(self):
        module, weights, *_ = self.mixing(1)
        for count, cores, chip in ((1, 1, V4), (3, 1, V4), (12, 2, V4), (20, 2, V4), (16, 1, V6E)):
            with self.subTest(count=count, chip=chip.name):
                x = random_input(3, count=count).requires_grad_()
                out, grad = module(x, module.weights(), 1), random_input(4, count=count)
                self.close(interpreted(pallas_kernels.token_mixing, chip, x, *weights)[0], out)
                x_grad, *sums = interpreted(
                    pallas_kernels.token_mixing_gradient, chip, x, grad, *weights
                )
                plain, gate_up, _ = torch.autograd.grad(out, (x, *module.parameters()), grad)
                self.assertEqual(len(sums[0]), cores)
                self.close(x_grad, plain)
                self.close(sums[0].sum(0), gate_up.chunk(2)[0])

    def test_which_sizes_fit_into_a_core(self):
        for length, dim, width, axis, on_v4, on_v6e in (
            (97, 512, 1536, 2, True, True),
            (97, 768, 2048, 2, True, True),
            (97, 1024, 2816, 2, False, True),
            (97, 1024, 512, 1, True, True),
            (97, 2048, 512, 1, False, True),
            (916, 512, 2560, 1, False, False),
            (97, 4096, 11008, 2, False, False),
            (97, 96, 256, 2, False, False),
        ):
            with self.subTest(length=length, dim=dim, axis=axis):
                fits = [pallas_kernels.fits(length, dim, width, axis, chip) for chip in (V4, V6E)]
                self.assertEqual(fits, [on_v4, on_v6e])


class TPUWithoutChips(Device):
    """What mixing.py takes for a v4: a CPU."""

    def __init__(self):
        super().__init__("cpu")
        self.name, self.is_xla, self.generation = "tpu", True, V4

    def end_step(self):
        pass


def tensordot(a, a_axes, b, b_axes):
    """xla_mixing.contract on the CPU."""
    axes = [[axes] if isinstance(axes, int) else list(axes) for axes in (a_axes, b_axes)]
    return torch.tensordot(a.float(), b.float(), axes)


class Training(unittest.TestCase):
    def setUp(self):
        patch = mock.patch.object(xla_mixing, "contract", tensordot)
        patch.start()
        self.addCleanup(patch.stop)

    def gradients(self, model, carry):
        """Loss, next state and all gradients of a training step."""
        rows = model.puzzle_rows(carry).requires_grad_()
        loss, _, after = trm_model.act_step(model, carry, rows, no_minimum(carry))
        gradients = torch.autograd.grad(loss, [*model.parameters(), rows])
        return [tensor.detach() for tensor in (loss, after.z_H, *gradients)]

    def check_same(self, **changes):
        """Gradients with kernels are the same as without. Returns how often each was called."""
        model = small_model(L_layers=2, H_cycles=2, **changes)
        carry = admitted(model)
        plain, calls = self.gradients(model, carry), []

        def call(function, chip, *tensors):
            calls.append(function.__name__)
            return interpreted(function, chip, *tensors)

        with (
            mock.patch.object(pallas_kernels, "fits", lambda *_: True),
            mock.patch.object(pallas_mixing, "call", call),
        ):
            pallas_mixing.use(model, V6E)
            self.assertEqual(mixing.num_kernels(model), 0)  # this model computes in float32
            for module in model.modules():
                module.mix = pallas_mixing.KernelMix(V6E)
            for ours, theirs in zip(self.gradients(model, carry), plain, strict=True):
                self.assertLess(((ours - theirs).norm() / theirs.norm()).item(), 2e-5)
        names = ("token_mixing", "token_mixing_gradient", "channel_mixing", "channel_mixing_kept")
        return [calls.count(name) for name in names]

    def test_the_same_gradients(self):
        # two layers, three calls of the network in a cycle, one cycle without gradient, one with
        for changes, calls in (
            (dict(), [12, 6, 6, 6]),
            (dict(mlp_t=False, pos_encodings="rope"), [0, 0, 6, 6]),
            (dict(activation_checkpointing=True), [18, 6, 6, 12]),
        ):
            with self.subTest(**changes):
                self.assertEqual(self.check_same(**changes), calls)

    def chosen(self, call, device=None, training=True):
        """What choose_mixing does on a TPU where `call` is what a kernel does.

        Returns (whether every SwiGLU is a kernel, what was printed on stderr).
        """
        model = small_model(forward_dtype="bfloat16")
        training_config = SimpleNamespace(
            pallas_kernels=True, global_batch_size=8, grad_accumulation_steps=2
        )
        config = SimpleNamespace(training=training_config, evaluation=SimpleNamespace(batch_size=6))
        with (
            mock.patch.object(pallas_kernels, "fits", lambda *_: True),
            mock.patch.object(pallas_mixing, "call", call),
            contextlib.redirect_stderr(io.StringIO()) as printed,
        ):
            mixing.choose_mixing(model, config, device or TPUWithoutChips(), training)
        mixes = {module.mix for module in model.modules() if isinstance(module, SwiGLU)}
        self.assertIn(mixes, ({pallas_mixing.KernelMix(V4)}, {xla_mixing.mix}))
        self.assertIs(model.L_level.recompute, xla_mixing.recompute_after_barrier)
        return mixes == {pallas_mixing.KernelMix(V4)}, printed.getvalue()

    def test_a_run_on_a_tpu_uses_kernels_that_compute_the_right_numbers(self):
        called = set()

        def call(function, chip, x, *rest):
            called.add((function.__name__, len(x)))
            return interpreted(function, chip, x, *rest)

        self.assertEqual(self.chosen(call), (True, ""))
        # a training batch in two parts, and an evaluation's
        forward = {(name, n) for name in ("token_mixing", "channel_mixing") for n in (4, 6)}
        self.assertEqual(
            called, forward | {("token_mixing_gradient", 4), ("channel_mixing_kept", 4)}
        )
        called.clear()
        self.assertEqual(self.chosen(call, training=False), (True, ""))
        self.assertEqual(called, {("token_mixing", 6), ("channel_mixing", 6)})

    def test_it_does_not_use_kernels_that_do_not(self):
        for broken, size, wrong_factor in (
            ("token_mixing", 4, 1.05),
            ("token_mixing", 6, 1.05),
            ("token_mixing_gradient", 4, 1.05),
            ("channel_mixing", 4, 1.05),
            ("channel_mixing", 6, 1.05),
            ("channel_mixing_kept", 4, 1.05),
            ("channel_mixing", 6, math.nan),
        ):

            def wrong(function, chip, x, *rest):
                factor = wrong_factor if (function.__name__, len(x)) == (broken, size) else 1
                return [factor * result for result in interpreted(function, chip, x, *rest)]

            with self.subTest(broken=broken, size=size, factor=wrong_factor):
                used, printed = self.chosen(wrong)
                self.assertFalse(used)
                self.assertRegex(
                    printed,
                    r"^warning: the TPU kernels are not used.* "
                    rf"axis {1 + ('channel' in broken)}.*{size} examples: "
                    r"(0\.\d+|nan) \(relative\) off",
                )

    def test_it_does_not_use_kernels_that_the_compiler_refuses(self):
        def refused(*_):
            raise TypeError("INTERNAL: Mosaic failed\nto compile")

        used, printed = self.chosen(refused)
        self.assertFalse(used)
        self.assertRegex(
            printed, r"^warning: .*: INTERNAL: Mosaic failed \(training.pallas_kernels=false"
        )

    def test_no_worker_uses_them_if_they_do_not_work_on_one(self):
        class TwoWorkers(Workers):
            def any(self, flag):
                self.vote = flag
                return flag or self.other_vote

        device = TPUWithoutChips()
        device.workers = TwoWorkers(0, 1)
        device.workers.world_size = 2
        for device.workers.other_vote, used, warning in (
            (False, True, "^$"),
            (True, False, "^warning: .* do not work on another worker"),
        ):
            found, printed = self.chosen(interpreted, device)
            self.assertEqual(found, used)
            self.assertRegex(printed, warning)
            self.assertFalse(device.workers.vote)
        device.workers.other_vote = False
        with mock.patch.dict(sys.modules, {"pallas_mixing": None}):  # as without jax
            found, printed = self.chosen(interpreted, device)
        self.assertFalse(found)
        self.assertRegex(printed, r"^warning: .*pallas_mixing.*\(training.pallas_kernels=false")
        self.assertTrue(device.workers.vote)  # and the other worker does not use them either


class Traced(XLATest):
    def test_traced_for_a_tpu(self):
        """In the program a kernel is one operation, with its cost."""
        module = SwiGLU(LENGTH, 4, torch.Generator().manual_seed(0)).to(self.device)
        x = random_input(0, torch.bfloat16).to(self.device).requires_grad_()
        out = pallas_mixing.TokenMixing.apply(x, *module.weights(), V4)
        (grad,) = torch.autograd.grad(out.float().sum(), x)
        text = torch_xla._XLAC._get_xla_tensors_hlo([out, grad])
        self.assertEqual(text.count('custom_call_target="tpu_custom_call"'), 2)
        self.assertEqual(tpu_hlo.product_flops(text), (1 + 3) * 2 * BATCH * DIM * 3 * LENGTH * 256)

    def test_the_check_of_a_run_is_one_program(self):
        def zeros(function, chip, *tensors):
            dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
            given = tuple(zip([tuple(tensor.shape) for tensor in tensors], dtypes))
            _, results = pallas_kernels.exported(function, chip, given)
            return [
                torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)
                for shape, dtype in results
            ]

        device, model = Device("xla_cpu"), small_model(forward_dtype="bfloat16")
        device.generation = V4
        with (
            mock.patch.object(pallas_kernels, "fits", lambda *_: True),
            mock.patch.object(pallas_mixing, "call", zeros),
        ):
            error = pallas_mixing.find_error(model, device, 4, 6)
        self.assertIn("backward, 4 examples: 1 (relative) off", error)
        counters = device.counters()
        self.assertEqual((counters["xla_compiles"], counters["xla_executions"]), (1, 1))


if __name__ == "__main__":
    unittest.main()
