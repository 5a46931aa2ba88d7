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

import tpu_types
import train_state
import trm_model
from collectives import Workers
from device import Device
from tests.helpers import ROOT, XLATest
from tests.test_model import admitted, no_minimum, small_model
from trm_model import SwiGLU

HAS_JAX = importlib.util.find_spec("jax") is not None
BATCH, LENGTH, DIM = 6, 19, 32
V4, V6E = (
    tpu_types.GENERATIONS["v4"],
    tpu_types.GENERATIONS["v6e"],
)  # of two cores a chip, and of one


@functools.cache
def compiled(function, chip):
    import jax

    return jax.jit(functools.partial(function, chip=chip, interpret=True))


def interpreted(function, chip, *tensors):
    """pallas_kernels.call without a TPU: jax interprets the kernel."""
    import jax.numpy as jnp

    results = compiled(function, chip)(
        *(
            jnp.asarray(
                tensor.detach().cpu().float().numpy(), str(tensor.dtype).removeprefix("torch.")
            )
            for tensor in tensors
        )
    )
    return [
        torch.tensor(result.astype(jnp.float32).tolist()).to(
            tensors[0].device, getattr(torch, str(result.dtype))
        )
        for result in results
    ]


def random_input(seed, dtype=torch.float32, count=BATCH):
    return torch.randn(count, LENGTH, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
        self.close(interpreted(pallas_kernels.token_mixing, V4, x, *weights)[0], out)
        x_grad, *sums = interpreted(pallas_kernels.token_mixing_gradient, V4, x, grad, *weights)
        plain, gate_up, down = torch.autograd.grad(out, (x, *swiglu.parameters()), grad)
        self.close(x_grad, plain)
        for ours, plain in zip(sums, (*gate_up.chunk(2), down)):
            self.assertEqual(len(ours), 2)  # the cores' shares
            self.close(ours.sum(0), plain)

    def test_channel_mixing_and_what_it_keeps(self):
        import pallas_kernels

        swiglu, weights, x, out, _ = self.mixing(2)
        self.close(interpreted(pallas_kernels.channel_mixing, V4, x, *weights)[0], out)
        ours, gate, up, scale = interpreted(pallas_kernels.channel_mixing_kept, V4, x, *weights)
        self.close(ours, out)
        self.close(gate, 2 * x @ weights[0].T)
        self.close(up, x @ weights[1].T)
        self.close(
            scale,
            (x + swiglu.mixed(x, swiglu.weights(), 2))
            .square()
            .mean(-1, keepdim=True)
            .add(1e-5)
            .rsqrt(),
        )

    def test_a_width_that_is_taken_in_parts(self):
        import pallas_kernels

        _, weights, x, out, _ = self.mixing(2)
        with mock.patch.object(pallas_kernels, "WIDTH_A_TIME", 100):
            in_parts = functools.partial(
                pallas_kernels.channel_mixing
            )  # another function, or an earlier trace would be used
            self.close(interpreted(in_parts, V4, x, *weights)[0], out)

    def test_any_number_of_examples(self):
        import pallas_kernels

        swiglu, weights, *_ = self.mixing(1)
        for count, cores, chip in (
            (1, 1, V4),
            (3, 1, V4),
            (6, 2, V4),
            (12, 2, V4),
            (20, 2, V4),
            (16, 1, V6E),
        ):
            with self.subTest(count=count, chip=chip.name):
                x = random_input(3, count=count).requires_grad_()
                out, grad = swiglu(x, swiglu.weights(), 1), random_input(4, count=count)
                self.close(interpreted(pallas_kernels.token_mixing, chip, x, *weights)[0], out)
                x_grad, *sums = interpreted(
                    pallas_kernels.token_mixing_gradient, chip, x, grad, *weights
                )
                plain, gate_up, _ = torch.autograd.grad(out, (x, *swiglu.parameters()), grad)
                self.assertEqual(len(sums[0]), cores)
                self.close(x_grad, plain)
                self.close(sums[0].sum(0), gate_up.chunk(2)[0])

    def test_examples_a_pass_are_as_many_as_fit(self):
        from pallas_kernels import fits

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
                self.assertEqual(
                    (fits(length, dim, width, axis, V4), fits(length, dim, width, axis, V6E)),
                    (on_v4, on_v6e),
                )


@unittest.skipUnless(
    HAS_JAX and importlib.util.find_spec("torch_xla"), "jax or torch_xla is not installed here"
)
class Training(unittest.TestCase):
    """On the CPU, where XLA's contractions are torch.tensordot's."""

    def setUp(self):
        import xla_mixing

        patch = mock.patch.object(
            xla_mixing,
            "contract",
            lambda a, a_axes, b, b_axes: torch.tensordot(
                a.float(),
                b.float(),
                tuple([axes] if isinstance(axes, int) else list(axes) for axes in (a_axes, b_axes)),
            ),
        )
        patch.start()
        self.addCleanup(patch.stop)

    def gradients(self, model, carry):
        rows = model.puzzle_rows(carry).requires_grad_()
        loss, _, new_carry = trm_model.act_step(model, carry, rows, no_minimum(carry))
        return [
            t.detach()
            for t in (loss, new_carry.z_H, *torch.autograd.grad(loss, [*model.parameters(), rows]))
        ]

    def check_same(self, **changes):
        import pallas_kernels

        model = small_model(L_layers=2, H_cycles=2, **changes)
        carry = admitted(model)
        plain, calls = self.gradients(model, carry), []

        def call(function, chip, *tensors):
            calls.append(function.__name__)
            return interpreted(function, chip, *tensors)

        with (
            mock.patch.object(pallas_kernels, "fits", lambda *_: True),
            mock.patch.object(pallas_kernels, "call", call),
        ):
            pallas_kernels.use(model, V6E)
            self.assertFalse(
                any(module.in_kernel for module in model.modules() if isinstance(module, SwiGLU))
            )  # this model is float32
            for module in model.modules():
                module.in_kernel = V6E
            for ours, theirs in zip(self.gradients(model, carry), plain, strict=True):
                self.assertLess(((ours - theirs).norm() / theirs.norm()).item(), 2e-5)
        return [
            calls.count(f"{name}")
            for name in (
                "token_mixing",
                "token_mixing_gradient",
                "channel_mixing",
                "channel_mixing_kept",
            )
        ]

    def test_the_same_gradients(self):
        # two layers, three calls of the network a cycle, one cycle without gradient and one with
        for changes, calls in (
            (dict(), [12, 6, 6, 6]),
            (dict(mlp_t=False, pos_encodings="rope"), [0, 0, 6, 6]),
            (dict(activation_checkpointing=True), [18, 6, 6, 12]),
        ):
            with self.subTest(**changes):
                self.assertEqual(self.check_same(**changes), calls)

    def used(self, call, device=None, training=True):
        """What train_state.use_kernels makes of a TPU on which `call` is what a kernel does: (each SwiGLU in a kernel?, what it says)."""
        import pallas_kernels

        device = device or Device("cpu")
        device.name, device.generation = "tpu", V4
        model = small_model(forward_dtype="bfloat16")
        config = SimpleNamespace(
            training=SimpleNamespace(
                pallas_kernels=True, global_batch_size=8, grad_accumulation_steps=2
            ),
            evaluation=SimpleNamespace(batch_size=6),
        )
        with (
            mock.patch.object(pallas_kernels, "fits", lambda *_: True),
            mock.patch.object(pallas_kernels, "call", call),
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            train_state.use_kernels(model, config, device, training)
        used = {module.in_kernel == V4 for module in model.modules() if isinstance(module, SwiGLU)}
        self.assertEqual(len(used), 1)
        return used.pop(), said.getvalue()

    def test_a_run_on_a_tpu_uses_kernels_that_compute_the_same_there(self):
        called = set()

        def call(function, chip, x, *rest):
            called.add((function.__name__, len(x)))
            return interpreted(function, chip, x, *rest)

        self.assertEqual(self.used(call), (True, ""))
        forward = {
            (name, size) for name in ("token_mixing", "channel_mixing") for size in (4, 6)
        }  # a training batch in two parts, an evaluation's
        self.assertEqual(
            called, forward | {("token_mixing_gradient", 4), ("channel_mixing_kept", 4)}
        )
        called.clear()
        self.assertEqual(self.used(call, training=False), (True, ""))
        self.assertEqual(called, {("token_mixing", 6), ("channel_mixing", 6)})

    def test_and_no_others(self):
        for broken, size in (
            ("token_mixing", 4),
            ("token_mixing", 6),
            ("token_mixing_gradient", 4),
            ("channel_mixing", 4),
            ("channel_mixing", 6),
            ("channel_mixing_kept", 4),
        ):

            def slightly_wrong(function, chip, x, *rest):
                factor = 1.05 if (function.__name__, len(x)) == (broken, size) else 1
                return [factor * result for result in interpreted(function, chip, x, *rest)]

            def refused(function, chip, x, *rest):
                if (function.__name__, len(x)) == (broken, size):
                    raise TypeError("INTERNAL: Mosaic failed\nto compile")
                return interpreted(function, chip, x, *rest)

            with self.subTest(broken=broken, size=size):
                used, said = self.used(slightly_wrong)
                self.assertFalse(used)
                self.assertRegex(
                    said,
                    rf"^warning: the TPU kernels are not used.* axis {1 + ('channel' in broken)}.*{size} examples: 0\.\d+ \(relative\) off",
                )
                used, said = self.used(refused)
                self.assertFalse(used)
                self.assertRegex(
                    said, r"^warning: .*: INTERNAL: Mosaic failed \(training.pallas_kernels=false"
                )

    def test_all_workers_do_without_them_where_one_has_none(self):
        class Other(Workers):
            def any(self, flag):
                self.cast = int(flag)
                return flag or bool(self.others)

        device = Device("cpu")
        device.workers = Other(0, 1)
        device.workers.world_size = 2
        for device.workers.others, used, says in (
            (0, True, "^$"),
            (1, False, "^warning: .* do not work on another worker"),
        ):
            self.assertEqual(self.used(interpreted, device)[0], used)
            self.assertRegex(self.used(interpreted, device)[1], says)
            self.assertEqual(device.workers.cast, 0)
        device.workers.others = 0
        import pallas_kernels  # before it cannot be

        with mock.patch.dict(sys.modules, {"jax": None}):
            del sys.modules["pallas_kernels"]
            self.addCleanup(sys.modules.__setitem__, "pallas_kernels", pallas_kernels)
            with contextlib.redirect_stderr(io.StringIO()) as said:
                config = SimpleNamespace(
                    training=SimpleNamespace(
                        pallas_kernels=True, global_batch_size=4, grad_accumulation_steps=1
                    ),
                    evaluation=SimpleNamespace(batch_size=4),
                )
                train_state.use_kernels(small_model(), config, device)
        self.assertRegex(said.getvalue(), r"^warning: .*jax.*\(training.pallas_kernels=false")
        self.assertEqual(device.workers.cast, 1)  # and tells the others


@unittest.skipUnless(HAS_JAX, "jax is not installed here")
class Traced(XLATest):
    def test_traced_for_a_tpu(self):
        """The program has the kernel, with what it costs, as one operation."""
        import torch_xla

        import pallas_kernels

        sys.path.insert(0, str(ROOT / "analysis"))
        import tpu_hlo

        swiglu = SwiGLU(LENGTH, 4, torch.Generator().manual_seed(0)).to(self.device)
        x = random_input(0, torch.bfloat16).to(self.device).requires_grad_()
        out = pallas_kernels.TokenMixing.apply(x, *swiglu.weights(), V4)
        (grad,) = torch.autograd.grad(out.float().sum(), x)
        text = torch_xla._XLAC._get_xla_tensors_hlo([out, grad])
        self.assertEqual(text.count('custom_call_target="tpu_custom_call"'), 2)
        self.assertEqual(tpu_hlo.product_flops(text), (1 + 3) * 2 * BATCH * DIM * 3 * LENGTH * 256)

    def test_the_check_of_a_run_is_one_program(self):
        import pallas_kernels

        def zeros(function, chip, *tensors):
            _, shapes, dtypes = pallas_kernels._traced(
                function, chip, tuple((tuple(t.shape), t.dtype) for t in tensors)
            )
            return [
                torch.zeros(shape, dtype=dtype, device=self.device)
                for shape, dtype in zip(shapes, dtypes)
            ]

        device, model = Device("xla_cpu"), small_model(forward_dtype="bfloat16")
        device.generation = V4
        with (
            mock.patch.object(pallas_kernels, "fits", lambda *_: True),
            mock.patch.object(pallas_kernels, "call", zeros),
        ):
            self.assertIn(
                "backward, 4 examples: 1 (relative) off", pallas_kernels.fault(model, device, 4, 6)
            )
        counters = device.counters()
        self.assertEqual((counters["xla_compiles"], counters["xla_executions"]), (1, 1))


if __name__ == "__main__":
    unittest.main()
