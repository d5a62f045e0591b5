"""Hardware as a value. Importing this package makes megatron-core usable without CUDA."""

from megatron_opdlm.hardware.select import Capture, Hardware, Product, Run, select_hardware

__all__ = ["Capture", "Hardware", "Product", "Run", "select_hardware"]

select_hardware()
