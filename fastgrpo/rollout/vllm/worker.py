"""What runs beside vLLM's model, in this process or in a server's worker."""

from __future__ import annotations

from typing import Any


def pack_heads(model: Any) -> None:
    """Bring the LM head up to date after new weights have been loaded, where vLLM does not.

    On a CPU vLLM multiplies by a packed copy of the head. A reload packs what the checkpoint names, and a tied head has
    no name there: the old copy would go on being used, without a word.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class PolicyWorker:
    """Mixed into the workers of a server by `--worker-extension-cls`; its methods are called by /collective_rpc."""

    def pack_policy_heads(self: Any) -> None:
        """See `pack_heads`."""
        pack_heads(self.get_model())
