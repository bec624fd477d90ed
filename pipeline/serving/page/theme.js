// Light and dark: use the visitor's earlier choice. Without one, follow the system.
const KEY = "self-forcing-theme";

const system = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

const apply = (theme) => {
  document.documentElement.dataset.theme = theme;
  document.body.classList.toggle("dark", theme === "dark"); // the class that Gradio uses
};

export function matchTheme() {
  apply(localStorage.getItem(KEY) ?? system());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (localStorage.getItem(KEY) === null) apply(system());
  });
}

export function toggleTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  if (theme === system()) localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, theme);
  apply(theme);
}
