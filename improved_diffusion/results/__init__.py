"""The reports of a run, a workbook and a web page, made from the files of the run."""
