"""What the states of an optimizer take, by the names of the training argument `optim`: as the trainer counts them."""

from ...training.optimizer_states import OPTIMIZERS as OPTIMIZERS
from ...training.optimizer_states import optimizer_bytes as optimizer_bytes
