"""This package holds the lens: what a model would say at each token if it stopped after each layer. It does not know
argv.

    lens = look(LLM("smollm2-135m"), "The capital of France is")
    lens.hidden_states  # [num_layers + 1, num_positions, hidden_size], as transformers' output_hidden_states
    Path("lens.html").write_text(lens_page(lens_record(lens)), encoding="utf-8")

Reading a layer's hidden state through the final norm and the head is nostalgebraist's "logit lens" (2020).
"""

from .look import Lens, PathView, look
from .page import lens_page
from .readings import Readings
from .record import lens_record

__all__ = ["Lens", "PathView", "Readings", "lens_page", "lens_record", "look"]
