"""Other projects' evaluation harnesses: lmms-eval (`lmms_eval`, `lmms_llava`, `lmms_llava_hf`, `lmms_task`) and
VLMEvalKit (`vlmeval`). Each module imports its harness, and is imported by that harness or by its user alone."""
