"""Builds lrcompress._C: always the CPU ops, and the CUDA ops when nvcc is found.

Environment, read at build time: LRC_CUDA=0 leaves the CUDA ops out; LRC_CUDA_ARCHS ("80;90") names the
compute capabilities; CUDA_HOME is the toolkit to use; LRC_WERROR=1 makes warnings errors, as .ci/run does: a
newer compiler's new warning must not break a user's install.
"""

import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
WERROR = os.environ.get("LRC_WERROR") == "1"


def find_nvcc() -> Path | None:
    """The nvcc of CUDA_HOME, else of the PATH; None without one or with LRC_CUDA=0."""
    if os.environ.get("LRC_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    return Path(found).resolve() if found else None


def find_cudart(nvcc: Path) -> Path:
    """The folder of the static CUDA run time; nvcc on the PATH may be a wrapper outside its toolkit."""
    for home in (os.environ.get("CUDA_HOME"), nvcc.parents[1], "/usr/local/cuda"):
        for folder in ("lib64", "lib"):
            if home and (Path(home) / folder / "libcudart_static.a").exists():
                return Path(home) / folder
    raise FileNotFoundError(f"no libcudart_static.a beside {nvcc}: set CUDA_HOME, or LRC_CUDA=0")


NVCC = find_nvcc()
ARCHS = os.environ.get("LRC_CUDA_ARCHS", "80;90").split(";")


def nvcc_version(nvcc: Path) -> str:
    """Such as 13.0.88."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"V([\d.]+)", text)
    return match.group(1) if match else "unknown"


def nvcc_command(nvcc: Path, source: str, output: Path) -> list[str]:
    """Machine code for every architecture, and PTX of the last one for those to come."""
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    gencode.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
    host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"
    strict = ["-Werror=all-warnings"] if WERROR else []
    flags = [
        "-O3",
        "-std=c++20",
        "-lineinfo",
        "--expt-relaxed-constexpr",
        "-Xptxas=-warn-spills",
        f"-Xcompiler={host}",
        f"-I{CSRC}",
    ]
    return [str(nvcc), "-c", source, "-o", str(output), *flags, *gencode, *strict]


def system_includes() -> list[str]:
    """Name the headers of others, whose warnings are not ours; only compiling needs these packages."""
    import pybind11
    import tvm_ffi

    folders = (pybind11.get_include(), Path(tvm_ffi.__file__).parent / "include" / "dlpack")
    return [f"-isystem{folder}" for folder in folders]


class BuildExt(build_ext):
    """Compiles .cpp and .cu files side by side, then links them."""

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension."""
        ext.extra_compile_args += system_includes()
        if self.has_openmp():
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self.compile_source(ext, source), ext.sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=ext.libraries,
            library_dirs=ext.library_dirs,
            extra_postargs=ext.extra_link_args,
            export_symbols=self.get_export_symbols(ext),
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def compile_source(self, ext: Extension, source: str) -> str:
        """Compile one file and return its object."""
        if source.endswith(".cu"):
            output = Path(self.build_temp) / f"{source}.o"
            output.parent.mkdir(parents=True, exist_ok=True)
            command = nvcc_command(NVCC, source, output)
            self.announce(" ".join(command), level=2)
            subprocess.run(command, check=True)
            return str(output)
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=ext.extra_compile_args,
        )[0]

    def has_openmp(self) -> bool:
        """Whether a program with -fopenmp compiles and links."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "openmp.cpp"
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
            compiler = self.compiler.compiler_cxx[0]
            command = [compiler, "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0


def extension() -> Extension:
    """Describe lrcompress._C."""
    sources = [CSRC / "bindings.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
    macros = [
        ("LRC_BUILD_CUDA_ARCHS", f'"{";".join(ARCHS) if NVCC else ""}"'),
        ("LRC_BUILD_NVCC_VERSION", f'"{nvcc_version(NVCC) if NVCC else ""}"'),
    ]
    library_dirs, libraries = [], []
    if NVCC:
        sources += sorted(CSRC.glob("cuda/*.cu"))
        macros.append(("LRC_WITH_CUDA", None))
        library_dirs = [str(find_cudart(NVCC))]
        # The run time is linked in, so the extension imports on a machine without CUDA.
        libraries = ["cudart_static", "dl", "rt", "pthread"]
    # -Wno-psabi: vectors wider than the oldest processor's registers never cross a call.
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    flags += ["-Werror"] if WERROR else []
    return Extension(
        "lrcompress._C",
        sources=[str(source) for source in sources],
        depends=[str(header) for header in sorted(CSRC.rglob("*.*h"))],
        include_dirs=[str(CSRC)],
        define_macros=macros,
        extra_compile_args=flags,
        library_dirs=library_dirs,
        libraries=libraries,
        language="c++",
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExt})
