"""Dynamic 4-bit: most linears in NF4, and those that the loss feels most kept in 16 bits, within a byte budget.

    linears.py       which linears can be quantized, what each weighs in either form, what rounding makes of its weight
    sensitivity.py   what rounding one linear does: to its weight, to its output, to the predictions
    selection.py     which to keep, under a budget; the table and the plot of it
    conversion.py    the model as bitsandbytes and transformers know it, saved and loaded by transformers alone
    dynamic.py       fxfuse.quantize
"""
