"""The command `diffusers-svi`: films, and what files of this package hold."""

import sys

import click

from .app import app
from .correct import correct
from .extend import extend
from .generate import generate
from .inspect import inspect
from .plan import plan


def main() -> None:
    """Run the command; its exit status is 0, 1 for an error, which is told in a line, or 130 for an interruption."""
    try:
        commands(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    }
)
def commands() -> None:
    """Videos of any length with Wan models and Stable Video Infinity (SVI) LoRAs."""


commands.add_command(app)
commands.add_command(generate)
commands.add_command(extend)
commands.add_command(inspect)
commands.add_command(plan)
commands.add_command(correct)
