"""Chat templates of common families by name, for models whose files bring none.

Written for mst from the formats that the families document; tests compare what they write with
the families' own templates. Each names the token that ends a turn, which a model must have.
"""

from __future__ import annotations

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{{ message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
# Gemma knows no system's turn: its text goes before the first question.
_GEMMA = (
    "{{ bos_token or '' }}"
    "{% set ns = namespace(first='') %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}"
    "{% set ns.first = message.content | trim + '\\n\\n' %}"
    "{% else %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}"
    "{{ (ns.first if message.role == 'user' else '') + message.content | trim }}"
    "{{ '<end_of_turn>\\n' }}"
    "{% if message.role == 'user' %}{% set ns.first = '' %}{% endif %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Name, then the template and the token that ends a turn.
NAMED = {
    "chatml": (_CHATML, "<|im_end|>"),
    "llama3": (_LLAMA3, "<|eot_id|>"),
    "gemma": (_GEMMA, "<end_of_turn>"),
    "phi3": (_PHI3, "<|end|>"),
}
