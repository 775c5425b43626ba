"""What a person types and sees. May import jobs, reports, measure, models, images and ops, inside commands only.

app                                     the application: commands, errors, exit codes
commands                                one module for each command
options, parsers, completion            options, their values, what the shell offers
helptext, tables, progress, terminal    help, results, progress, and what the streams can take
preflight                               whether torch and timm can be imported
"""
