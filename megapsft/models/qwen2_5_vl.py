"""Qwen2.5-VL: its language model is Qwen2's. The vision tower is carried along, as the bytes that it is, and never loaded.

Text alone is trained. Each of its tokens has one position, which is its time, its height and its width; the sections of
`mrope_section` turn by the same angle then, and the rotary embedding is the plain one.

    model.layers.0...                  visual.blocks.0...              as released, and here
    model.language_model.layers.0...   model.visual.blocks.0...        as the modules of transformers 5 are called

Source: Qwen2.5-VL Technical Report (Bai et al., 2025), section 2.1.
"""

from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig
from megapsft.models.names import Spelling
from megapsft.models.qwen2 import Qwen2


class Qwen25VL(Qwen2):
    architecture = "Qwen2_5_VLForConditionalGeneration"
    mrope = True
    carried = "visual."
    spelling = Spelling((("model.language_model.", "model."), ("model.visual.", "visual.")))
    served = False

    def check(self, hf: HFConfig) -> None:
        section = hf.rope.mrope_section
        if section is None or sum(section) != hf.head_dim // 2:
            value = f"config.json: mrope_section={section if section is None else list(section)} of {hf.architecture}"
            rule = f"must share out the {hf.head_dim // 2} pairs of dimensions of a head among time, height and width"
            raise Refused(value, rule, "download config.json again")
