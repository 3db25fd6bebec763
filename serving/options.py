"""Which of vLLM's options go with folded attention: its check of a model's options, for ours."""

from vllm.config import VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from kvfold.serving.checks import SERVED, folded_architecture
from kvfold.serving.ranks import unsplit


class Checked(VerifyAndUpdateConfig):
    """What of vLLM's options goes with folded attention. It runs step by step in Python, so nothing is compiled or captured."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises: ValueError, for what is not served."""
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        refused = {
            "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
            "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
            "--quantization": vllm_config.model_config.quantization is not None,
            "--kv-cache-dtype": cache.cache_dtype != "auto",
            "--enable-lora": vllm_config.lora_config is not None,
            "--speculative-config": vllm_config.speculative_config is not None,
            "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        }
        if unserved := [option for option, asked in refused.items() if asked]:
            raise ValueError(f"folded attention does not go with {', '.join(unserved)}; leave it out")
        if reason := unsplit(vllm_config.model_config.hf_config.folded_layers, parallel.tensor_parallel_size):
            raise ValueError(reason)
        vllm_config.model_config.enforce_eager = True


def check_options() -> None:
    """Have vLLM ask `Checked` whenever it is given a folded checkpoint."""
    MODELS_CONFIG_MAP.update({folded_architecture(family): Checked for family in SERVED})
