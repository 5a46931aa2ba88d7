"""Which implementation of its SwiGLUs a model uses: PyTorch's, that for XLA, or TPU kernels."""

import sys

import torch

from config import Config
from device import Device
from layers import SwiGLU
from tpu_types import Generation
from trm_model import TinyRecursiveModel


def choose_mixing(
    model: TinyRecursiveModel, config: Config, device: Device, training: bool = True
) -> None:
    """Give each SwiGLU of the model the implementation of `mix` for the device. Collective.

    Call it while the model is on the CPU. A TPU gets the kernels if they compute the right numbers
    on every worker. If they do not, rank 0 prints a warning. training: also check the kernels
    forward and backward at the batch size of training. An evaluation's batch size is always
    checked.
    """
    if not device.is_xla:
        return
    # torch_xla is needed on XLA devices only
    import xla_mixing

    xla_mixing.use(model)
    if device.name != "tpu" or not config.training.pallas_kernels:
        return
    reason = _reason_against_kernels(model, config, device, training)
    if not device.workers.any(reason is not None):
        assert device.generation, "a TPU has a generation"
        use_kernels(model, device.generation)
    elif device.workers.rank == 0:
        print(
            "warning: the TPU kernels are not used, and a step takes longer: "
            f"{reason or 'they do not work on another worker'} "
            "(training.pallas_kernels=false: no kernels, no warning)",
            file=sys.stderr,
        )


def use_kernels(model: TinyRecursiveModel, chip: Generation) -> None:
    """Let each SwiGLU that fits this generation of TPU run as a kernel."""
    # jax is needed for the kernels only
    import pallas_mixing

    pallas_mixing.use(model, chip)


def _reason_against_kernels(model, config, device, training):
    """Why the kernels cannot be used on this worker, one line, or None."""
    num_parts = device.workers.world_size * config.training.grad_accumulation_steps
    training_batch = config.training.global_batch_size // num_parts if training else None
    try:
        import pallas_mixing  # needs jax, too

        return pallas_mixing.find_error(model, device, training_batch, config.evaluation.batch_size)
    # jax may be missing, and jax, its export or the compiler may raise anything: no reason to end a
    # run that can do without kernels
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0][:200]


def num_kernels(model: torch.nn.Module) -> int:
    """The number of SwiGLUs that run as TPU kernels."""
    swiglus = [module for module in model.modules() if isinstance(module, SwiGLU)]
    # only pallas_mixing.KernelMix has a chip
    return sum(hasattr(swiglu.mix, "chip") for swiglu in swiglus)
