"""What layers and models are made of."""

from typing import Any

from torch import nn


class Module(nn.Module):
    """A torch module that is called without a look for hooks: in a step with few tokens the looks
    of a few hundred calls cost more than some of the kernels."""

    def __call__(self, *inputs: Any) -> Any:
        return self.forward(*inputs)
