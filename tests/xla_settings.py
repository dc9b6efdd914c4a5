"""XLA's own settings, where a test judges fusions or last bits: see conftest.py."""

import jax

OWN = {"xla_backend_optimization_level": 3, "xla_cpu_parallel_codegen_split_count": 32}
if jax.__version_info__ < (0, 11):
    OWN["xla_cpu_use_fusion_emitters"] = True
