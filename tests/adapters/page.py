def peft_page(o): return ""
