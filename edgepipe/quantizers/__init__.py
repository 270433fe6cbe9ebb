"""Choose codes with the help of data: one method a file, imported when it is used; and what all of them look at."""

METHODS = ("rtn", "gptq", "awq", "hqq", "autoround")
WITHOUT_DATA = ("rtn", "hqq")
