"""The source of a module with a blend and a steering from outside the package."""

MODULE = '''
import torch
from dblightning.blending import Blend, BlendStep
from dblightning.sampling import State, Steering


class Share(Blend):
    """A share of the first adapter in the weights, the rest of the base model: DB-KLA with that λ."""

    def __init__(self, weights, share=0.5):
        self.adapter = next(iter(weights))
        self.share = share

    def start(self, adapters, batch, num_steps, generators=None):
        one_hot = torch.tensor([float(name == self.adapter) for name in adapters])
        gates = torch.stack([torch.zeros(len(adapters)), one_hot])[:, None].expand(-1, batch, -1)
        mix = torch.tensor([1 - self.share, self.share], dtype=torch.float64)[:, None].expand(-1, batch)
        return lambda step_index: BlendStep(gates, mix)


class Still(Steering):
    """Plain steps, with the latents multiplied at the end."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def step(self, run, step_index, state):
        output = run.predict(state.latents, step_index)
        following = run.solver.step(output, state.latents, step_index, run.noise)
        return output, State(following * (self.factor if step_index == run.num_steps - 1 else 1.0))


class Nothing:
    pass
'''
