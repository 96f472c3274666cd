"""How good an adapter is: held-out loss, answers, task metrics, always beside the bare base.

heldout    rows -> token-weighted loss
generate   prompt -> answer
compare    base and adapter on the same rows and questions, and the table of both
charts     losses drawn as SVG and PNG
metrics    answers -> exact_match, accuracy, f1, chrf, bleu, rouge_l
"""
