"""What layers and models are made of."""

from typing import Any

from torch import nn


class Module(nn.Module):
    """A torch module whose calls and attributes cost little: in a step with one token, looking for
    hooks and in the tables of parameters takes longer than some of the kernels."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__[name] = value  # where Python looks first

    def __call__(self, *inputs: Any) -> Any:
        return self.forward(*inputs)
