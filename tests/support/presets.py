"""The operators of ``conf/operator``, composed once for all test modules of a process."""

from convnn.config.compose import compose_config, config_groups

PRESETS = {name: compose_config([f"operator={name}"]).operator for name in config_groups()["operator"]}
