"""Hardware as a value. Importing this package makes megatron-core usable without CUDA."""

from megatron_opdlm.hardware.select import Hardware, select_hardware

__all__ = ["Hardware", "select_hardware"]

select_hardware()
